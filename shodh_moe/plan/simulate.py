"""Simulate training steps of many ranks that are not equally fast and do not have equal loads.

A discrete-event simulation (simpy): each rank computes, then waits for the others of its group at each exchange. What
the ranks compute and exchange takes the times of `predict`, multiplied by a rank's and a step's random factors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.parallel.layout import CONTEXT, EXPERTS, REPLICAS, WORLD, Layout
from shodh_moe.parallel.sample_exchange import share_out
from shodh_moe.plan.machine import Machine
from shodh_moe.plan.predict import Prediction, predict
from shodh_moe.training.deepspeed_config import exchanges_samples, layout_of

QUANTILES = (0.05, 0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Stragglers:
    """How much slower ranks are than the fastest; assumed, not measured.

    Attributes:
        ranks: standard deviation of the logarithm of a rank's factor, which it keeps.
        steps: the same of a factor that is drawn for each rank and step.
        stall_chance: probability that a rank stalls in a step, for example in its file system.
        stall: how long, in seconds.
    """

    ranks: float = 0.02
    steps: float = 0.02
    stall_chance: float = 1e-5
    stall: float = 0.5


EVEN = Stragglers(0, 0, 0, 0)


@dataclass(frozen=True)
class Spread:
    """Step times of a simulation, in seconds.

    Attributes:
        steps: time of each step, until all ranks have made it.
        predicted: `Prediction.step`, where all ranks are equally fast and have equal loads.
    """

    steps: NDArray[np.float64]
    predicted: float

    @property
    def mean(self) -> float:
        return float(self.steps.mean())

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.steps, share))


def simulate(
    config: Config,
    world: int,
    machine: Machine,
    stragglers: Stragglers | None = None,
    load_E: Sequence[float] | None = None,
    steps: int = 50,
    seed: int = 0,
) -> Spread:
    """Simulate ``steps`` optimizer steps of ``world`` ranks.

    Args:
        stragglers: None: the assumed ones.
        load_E: share of the samples (or tokens) that each expert gets; None: all ranks have equal loads. With an
            exchange of samples each sample draws its expert, and ranks share them out as in a training. With one of
            tokens every rank has these shares, because its micro-batch has many tokens.

    Raises:
        UserError: simpy is missing, or a load is not one.
    """
    simpy = _simpy()
    stragglers = stragglers or Stragglers()
    random = np.random.default_rng(seed)
    found = predict(config, world, machine)
    layout = layout_of(config, world)
    factor_SW = _factors(stragglers, steps, world, random)
    stall_SW = stragglers.stall * (random.random((steps, world)) < stragglers.stall_chance)
    load_SWA = _loads(config, layout, load_E, steps, random)

    environment = simpy.Environment()
    meet = _Meetings(environment, layout)
    ends = np.zeros((steps, world))
    plan = _phases(config, found)

    def rank(number: int) -> Generator[Any, None, None]:
        for step in range(steps):
            yield environment.timeout(float(stall_SW[step, number]))
            for place, phase in enumerate(plan):
                share = load_SWA[step, number, phase.micro_batch] if phase.micro_batch is not None else 1.0
                own = phase.fixed + share * phase.loaded
                yield environment.timeout(own * float(factor_SW[step, number]))
                if phase.group is not None:
                    yield meet.all(phase.group, number, (step, place), phase.exchange)
            ends[step, number] = environment.now

    for number in range(world):
        environment.process(rank(number))
    environment.run()
    done = ends.max(axis=1)
    return Spread(np.diff(done, prepend=0.0), found.step)


@dataclass(frozen=True)
class _Phase:
    """What a rank does until the next exchange, and the exchange.

    Attributes:
        fixed: seconds of computing that do not depend on its load.
        loaded: seconds that are proportional to it.
        micro_batch: whose load it is; None: no load.
        group: ranks that meet afterwards; None: nobody.
        exchange: seconds from the arrival of the last of them until they go on.
    """

    fixed: float
    loaded: float
    micro_batch: int | None
    group: str | None
    exchange: float


def _phases(config: Config, found: Prediction) -> list[_Phase]:
    """The phases of a step, in order."""
    accumulation = config.training.accumulation
    waits = {(one.row.why, one.row.group): one.exposed for one in found.exchanged}
    there = waits.pop(("samples", EXPERTS), 0.0) / accumulation
    tokens = (waits.pop(("tokens", EXPERTS), 0.0) + waits.pop(("numbers of tokens", EXPERTS), 0.0)) / accumulation
    slabs = sum(waits.pop(key) for key in list(waits) if key[1] == CONTEXT) / accumulation
    update = found.compute.get("optimizer", 0.0)
    passes = (sum(found.compute.values()) - update) / accumulation
    data = found.data / accumulation
    phases = []
    for micro_batch in range(accumulation):
        if tokens:
            # Ranks meet at each exchange: here once in each direction of each layer.
            meetings, experts = 2 * config.model.depth, found.compute.get("experts", 0.0) / accumulation
            phases.append(_Phase(data, 0.0, None, None, 0.0))
            each = _Phase((passes - experts) / meetings, experts / meetings, micro_batch, EXPERTS, tokens / meetings)
            phases += [each] * meetings
        else:
            phases.append(_Phase(data, 0.0, None, EXPERTS if there else None, there))
            phases.append(_Phase(0.0, passes, micro_batch, EXPERTS if there else None, 0.0))
        if slabs:  # the ranks of a CP group meet in each layer: here once, as they have equal loads
            phases.append(_Phase(0.0, 0.0, None, CONTEXT, slabs))
    for group in (REPLICAS, WORLD):
        before = sum(time for (why, where), time in waits.items() if where == group and why != "updated weights")
        phases.append(_Phase(0.0, 0.0, None, group, before))
    for place, group in enumerate((REPLICAS, WORLD)):
        after = waits.get(("updated weights", group), 0.0)
        phases.append(_Phase(0.0 if place else update, 0.0, None, group if after else None, after))
    return phases


class _Meetings:
    """Ranks that wait for each other."""

    def __init__(self, environment: Any, layout: Layout):
        self._environment = environment
        # The number of each rank's group, and the group's size, by kind.
        self._groups = {
            kind: {rank: (number, len(ranks)) for number, ranks in enumerate(layout.groups(kind)) for rank in ranks}
            for kind in (WORLD, EXPERTS, REPLICAS, CONTEXT)
        }
        self._waiting: dict[tuple[Any, ...], list[Any]] = {}

    def all(self, group: str, rank: int, when: tuple[int, int], seconds: float) -> Any:
        """An event that happens ``seconds`` after the last rank of the group has come."""
        number, size = self._groups[group][rank]
        key = (group, number, when)
        waiting = self._waiting.setdefault(key, [self._environment.event(), 0])
        event = waiting[0]
        waiting[1] += 1
        if waiting[1] == size:
            del self._waiting[key]
            self._environment.timeout(seconds).callbacks.append(lambda _: event.succeed())
        return event


def _factors(stragglers: Stragglers, steps: int, world: int, random: np.random.Generator) -> NDArray[np.float64]:
    """By how much each rank is slower in each step than predicted, [steps, world]."""
    kept_W = random.normal(0, 1, world) * stragglers.ranks
    drawn_SW = random.normal(0, 1, (steps, world)) * stragglers.steps
    return np.exp(kept_W + drawn_SW)


def _loads(
    config: Config, layout: Layout, load_E: Sequence[float] | None, steps: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Load of each rank in each micro-batch relative to an even one, [steps, world, accumulation]."""
    t, experts = config.training, config.model.moe.num_experts
    ep, shape = layout.ep, (steps, layout.world, t.accumulation)
    if load_E is None or ep == 1:
        return np.ones(shape)
    share_E = _checked(load_E, experts)
    holder_E = np.arange(experts) // (experts // ep)
    if not exchanges_samples(config, ep):
        held_G = np.bincount(holder_E, weights=share_E, minlength=ep) * ep
        held_W = held_G[[layout.expert_rank(rank) for rank in range(layout.world)]]
        return np.broadcast_to(held_W[None, :, None], shape)
    found = np.empty(shape)
    for step in range(steps):
        # All slabs of a sample move together, so one draw serves the EP groups of all slabs.
        for first in range(0, layout.world, ep * layout.cp):
            for micro_batch in range(t.accumulation):
                drawn_GE = random.multinomial(t.batch_size, share_E, size=ep)
                count_GG = [[int(row[holder_E == rank].sum()) for rank in range(ep)] for row in drawn_GE]
                computed_G = np.zeros(ep)
                for share in share_out(count_GG, config.parallel.exchange_capacity):
                    computed_G[share.rank] += share.samples
                found[step, first : first + ep * layout.cp, micro_batch] = (
                    np.repeat(computed_G, layout.cp) / t.batch_size
                )
    return found


def _checked(load_E: Sequence[float], experts: int) -> NDArray[np.float64]:
    share_E = np.asarray(load_E, dtype=np.float64)
    if len(share_E) != experts or not np.isfinite(share_E).all() or (share_E < 0).any() or share_E.sum() <= 0:
        raise UserError(f"the load {list(load_E)} does not name a share, at least 0, for each of {experts} experts")
    return share_E / share_E.sum()


def _simpy() -> ModuleType:
    try:
        import simpy
    except ImportError:
        raise UserError("--simulate needs simpy, which is not installed: pip install 'shodh_moe[plan]'") from None
    found: ModuleType = simpy
    return found
