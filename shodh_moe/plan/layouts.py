"""Compare all layouts of the ranks that make the same optimizer step, and choose the fastest that fits the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shodh_moe.base.divisors import divisors
from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.plan.hardware import GPUS
from shodh_moe.plan.machine import ASSUMED, Machine
from shodh_moe.plan.predict import Prediction, predict
from shodh_moe.runs.plan import memory
from shodh_moe.training.deepspeed_config import exchanges_samples, layout_of


@dataclass(frozen=True)
class StepLayout:
    """One way to divide an optimizer step among the ranks.

    Attributes:
        ep: ranks that share the experts.
        zero: ZeRO stage.
        exchange: ``sample`` or ``token``; ``none`` if every rank holds all experts.
        checkpointing: activation checkpointing.
        micro_batch, accumulation: samples of a rank's micro-batch, and micro-batches of a step.
    """

    ep: int
    zero: int
    exchange: str
    checkpointing: bool
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, config: Config, world: int) -> StepLayout:
        """The layout that a config has with ``world`` ranks. Raises `UserError` if it does not fit them."""
        ep, t = layout_of(config, world).ep, config.training
        exchange = "none" if ep == 1 else "sample" if exchanges_samples(config, ep) else "token"
        stage, checkpointing = config.parallel.zero_stage, t.activation_checkpointing
        return cls(ep, stage, exchange, checkpointing, t.batch_size, t.accumulation)

    def applied_to(self, config: Config) -> Config:
        """Return the config with this layout."""
        parallel: dict[str, Any] = {"ep_size": self.ep, "zero_stage": self.zero}
        if self.exchange != "none":
            parallel["exchange"] = self.exchange
        training = {
            "activation_checkpointing": self.checkpointing,
            "batch_size": self.micro_batch,
            "accumulation": self.accumulation,
        }
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=parallel),
                "training": config.training.model_copy(update=training),
            }
        )

    @property
    def settings(self) -> str:
        """The layout as overrides of a command line."""
        found = [f"parallel.ep_size={self.ep}", f"parallel.zero_stage={self.zero}"]
        if self.exchange != "none":
            found.append(f"parallel.exchange={self.exchange}")
        found.append(f"training.activation_checkpointing={str(self.checkpointing).lower()}")
        return " ".join([*found, f"training.batch_size={self.micro_batch} training.accumulation={self.accumulation}"])


@dataclass(frozen=True)
class Choice:
    """A layout with its prediction."""

    layout: StepLayout
    prediction: Prediction


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        choices: the layouts that fit the memory, the fastest first.
        configured: the config's own layout, whether it fits or not.
        considered: number of layouts, with those that do not fit.
    """

    choices: list[Choice]
    configured: Choice
    considered: int


def layouts(config: Config, world: int) -> Iterator[StepLayout]:
    """Yield every layout with the config's samples per step, and as many of them on each rank."""
    own = config.training.batch_size * config.training.accumulation
    for ep in divisors(math.gcd(world // config.parallel.context_size, config.model.moe.num_experts)):
        exchanges = ["none"] if ep == 1 else ["sample", "token"] if config.samples_have_paths else ["token"]
        for exchange in exchanges:
            for zero in (0, 1, 2):
                for checkpointing in (False, True):
                    for micro_batch in divisors(own):
                        if micro_batch == own or mixes_domains(config, micro_batch):
                            yield StepLayout(ep, zero, exchange, checkpointing, micro_batch, own // micro_batch)


def mixes_domains(config: Config, micro_batch: int) -> bool:
    """Whether a micro-batch of this size can be divided among the domains. Those of ``data.path`` are not known."""
    names = sorted(name for name, _ in config.data.domains.items())
    if config.data.path or not names:
        return True
    try:
        DomainSampler((1,) * len(names), micro_batch, 0, weights=domain_weights(config.data.weights, names))
    except UserError:
        return False
    return True


def compare(config: Config, world: int, machine: Machine) -> Comparison:
    """Predict all layouts of ``world`` ranks.

    Raises:
        UserError: no layout fits, or the machine cannot be used; the message names the nearest choice.
    """
    configured = StepLayout.of(config, world)
    found: list[Choice] = []
    smallest, considered = math.inf, 0
    for layout in layouts(config, world):
        considered += 1
        applied = layout.applied_to(config)
        needed = memory(applied, world)["sum"]
        smallest = min(smallest, needed)
        if machine.memory is None or needed <= machine.memory:
            found.append(Choice(layout, predict(applied, world, machine)))
    if not found:
        assert machine.memory is not None
        raise UserError(
            f"no layout of {world} ranks fits {machine.name}: the smallest needs {smallest / 1e9:.0f} GB of "
            f"{machine.memory / 1e9:.0f} GB per rank; {_larger(smallest)}"
        )
    found.sort(key=lambda choice: (choice.prediction.step, choice.prediction.memory))
    own = Choice(configured, predict(config, world, machine))
    return Comparison(found, own, considered)


def _larger(needed: float) -> str:
    """What to do if ``needed`` bytes fit no rank: the smallest GPU that has as many."""
    fits = {name: gpu.memory for name, gpu in GPUS.items() if gpu.memory - ASSUMED.reserved >= needed}
    if fits:
        return f"the nearest that fits is --gpu {min(fits, key=lambda name: fits[name])}"
    return "no known GPU has as much: lower model.dim, model.depth or data.grid, or plan for more ranks"


def with_global_batch(config: Config, world: int, samples: int | None) -> Config:
    """Return the config with this many samples per step over all ranks, in one micro-batch; None: the config's own.

    Raises:
        UserError: the ranks cannot have equal numbers of them; the message names the nearest world sizes that can.
    """
    if samples is None:
        return config
    if samples < 1:
        raise UserError(f"--global-batch {samples}: give the number of samples per step over all ranks, at least 1")
    fits = [one for one in divisors(samples) if mixes_domains(config, samples // one)]
    if not fits:
        raise UserError(f"--global-batch {samples} cannot be divided among the domains of data.domains: change one")
    if world not in fits:
        below, above = [one for one in fits if one < world], [one for one in fits if one > world]
        near = " or ".join(str(one) for one in [*below[-1:], *above[:1]])
        raise UserError(
            f"--world {world} cannot share --global-batch {samples} with each domain in every rank's part: the nearest "
            f"numbers of ranks that can are {near}"
        )
    training = config.training.model_copy(update={"batch_size": samples // world, "accumulation": 1})
    return config.model_copy(update={"training": training})


def reason(choice: Choice, best: Choice) -> str:
    """Say what limits a layout, or which part makes it slower than the best one."""
    if choice.layout == best.layout:
        limits = ", ".join(f"{name} {share:.0%}" for name, share in choice.prediction.limits[:2])
        return f"limited by {limits}"
    parts, others = choice.prediction.parts, best.prediction.parts
    grown = sorted(((time - others.get(name, 0.0), name) for name, time in parts.items()), reverse=True)
    slower = choice.prediction.step / best.prediction.step - 1
    if slower < 5e-4:
        return "as fast"
    most = ", ".join(f"{name} +{1e3 * time:.3g} ms" for time, name in grown[:2] if time > 0)
    return f"{slower:.1%} slower: {most}"
