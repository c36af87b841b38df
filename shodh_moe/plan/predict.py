"""Predict the time of a training step: a roofline for each kind of operation, and the alpha-beta model of collectives.

On a GPU the host launches operations ahead of the device, so computing takes the longer of both; on a CPU each
operation takes its own time besides. Reading latents precedes each micro-batch; on a GPU the host reads the first ones
while the device still updates the weights. Collectives wait for the device and the device for them, with two
exceptions that the code has: a dispatch travels while the shared experts compute, and with DeepSpeed's ``overlap_comm``
on a GPU buckets of gradients travel during the backward pass.

All ranks have the same load here; `simulate` lets them differ. All times are in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.plan.collectives import collective_seconds, exposed_seconds, place_of
from shodh_moe.plan.machine import MEASURE, Machine, Rates
from shodh_moe.plan.operations import Cost, Operation, work_of
from shodh_moe.runs.plan import batch_tokens, memory, step_samples
from shodh_moe.runs.traffic import Traffic, step_traffic
from shodh_moe.training.deepspeed_config import deepspeed_config, layout_of


@dataclass(frozen=True)
class Exchanged:
    """The time of one row of `Traffic` in a step: ``seconds`` in all, of which the step waits for ``exposed``."""

    row: Traffic
    seconds: float
    exposed: float


@dataclass(frozen=True)
class Prediction:
    """What a step takes.

    Attributes:
        compute: time of a step by part, without exchanges and data; its keys are `Part`, and ``launching`` for the
            time that a GPU waits for its host.
        exchanged: exchanges between ranks.
        data: time for which the step waits for latents.
        memory: bytes of a rank's device (`shodh_moe.runs.plan.memory`).
        tokens: tokens of a step, over all ranks.
    """

    compute: dict[str, float]
    exchanged: list[Exchanged]
    data: float
    memory: int
    tokens: int

    @property
    def exchanges(self) -> float:
        """Time for which the step waits for exchanges."""
        return sum(one.exposed for one in self.exchanged)

    @property
    def step(self) -> float:
        """Time of a step."""
        return sum(self.compute.values()) + self.exchanges + self.data

    @property
    def parts(self) -> dict[str, float]:
        """All parts of a step by name."""
        found = dict(self.compute)
        for one in self.exchanged:
            name = f"exchange of {one.row.why} ({one.row.group})"
            found[name] = found.get(name, 0.0) + one.exposed
        return {**found, "data": self.data}

    @property
    def limits(self) -> list[tuple[str, float]]:
        """The parts with their shares of the step, largest first."""
        return sorted(((name, time / self.step) for name, time in self.parts.items()), key=lambda part: -part[1])


def predict(config: Config, world: int, machine: Machine) -> Prediction:
    """Predict a step of ``world`` ranks.

    Raises:
        UserError: the layout does not fit ``world`` ranks, or the machine lacks a dtype or a network.
    """
    ep, t = layout_of(config, world).ep, config.training
    rates, ahead = machine.rates(world), machine.device == "cuda"
    if t.precision not in rates.products:
        raise UserError(
            f"{machine.name} has no rate of products in {t.precision}: choose training.precision from "
            f"{', '.join(rates.products)}, or measure it with `{MEASURE} --dtypes {t.precision}`"
        )
    work = work_of(config, ep, world, fused=ahead)
    depth, again = config.model.depth, int(t.activation_checkpointing)
    timer = functools.partial(_Timer, rates, t.precision, ahead)
    forward, backward, update, shared = timer(), timer(), timer(), timer()
    for operations, count, more in ((work.block, depth, again), (work.ends, 1, 0)):
        forward.add(operations, count * t.unroll, 0)
        backward.add(operations, more * count * t.unroll, count * t.unroll)
    backward.take("norms and sums", again * depth * t.unroll * rates.recompute)
    update.add([Operation("optimizer", "memory", work.accumulation, Cost())], t.accumulation - 1, 0)
    update.add([Operation("optimizer", "memory", Cost(0, work.update, 1), Cost())], 1, 0)
    update.take("optimizer", rates.step + work.tensors * rates.tensor[config.parallel.zero_stage])
    shared.add(work.shared, 1, 0)

    compute: dict[str, float] = {}
    for part, times in ((forward, t.accumulation), (backward, t.accumulation), (update, 1)):
        for name, time in part.parts.items():
            compute[name] = compute.get(name, 0.0) + times * time
    late = max(0.0, forward.host + backward.host - forward.device - backward.device)
    if launching := t.accumulation * late + max(0.0, update.host - update.device):
        compute["launching"] = launching

    reading = work.read / rates.reading + t.batch_size * rates.sample
    waiting = max(0.0, update.device - update.host) if ahead else 0.0  # the host reads meanwhile
    data = reading * t.accumulation - min(reading, waiting)
    exchanged = _exchanges(config, world, machine, backward.device, shared.device)
    tokens = step_samples(config, world) * (batch_tokens(config) // t.batch_size)
    peak = memory(config, world)["sum"]
    return Prediction(compute, exchanged, data, peak, tokens)


def seconds(cost: Cost, kind: str, backward: bool, rates: Rates, precision: str, ahead: bool) -> float:
    """Time of operations of one kind on the device, without the host's; the rates are those of their mean size."""
    if not cost.calls:
        return 0.0
    moved = cost.bytes / rates.memory.at(max(cost.bytes / cost.calls, 1.0)) if cost.bytes else 0.0
    if not cost.flops:
        return moved
    curves = rates.products
    if kind == "attention":
        curves = rates.attention_backward if backward else rates.attention
    computed = cost.flops / curves[precision].at(cost.flops / cost.calls)
    # A measured rate of products contains the memory's part.
    return max(computed, moved) if ahead else computed


class _Timer:
    """Sums the times of operations by part.

    Attributes:
        parts: seconds on the device, on a CPU with the time that each operation takes besides.
        host: seconds of the host to launch them; 0 on a CPU.
    """

    def __init__(self, rates: Rates, precision: str, ahead: bool):
        self.parts: dict[str, float] = {}
        self.host = 0.0
        self._rates, self._precision, self._ahead = rates, precision, ahead

    def add(self, operations: Iterable[Operation], forward: float, backward: float) -> None:
        """Add operations that run ``forward`` and ``backward`` times."""
        for one in operations:
            for cost, times, back in ((one.forward, forward, False), (one.backward, backward, True)):
                time = seconds(cost, one.kind, back, self._rates, self._precision, self._ahead)
                self.parts[one.part] = self.parts.get(one.part, 0.0) + times * time
                launch = self._rates.kernel if one.kind == "kernel" else self._rates.operation
                # A measured rate of products contains the time of the operation.
                if self._ahead or one.kind in ("memory", "kernel"):
                    self.take(one.part, times * cost.calls * launch)

    def take(self, part: str, time: float) -> None:
        """Add time of the host."""
        if self._ahead:
            self.host += time
        else:
            self.parts[part] = self.parts.get(part, 0.0) + time

    @property
    def device(self) -> float:
        """Seconds on the device; on a CPU of everything."""
        return sum(self.parts.values())


def _exchanges(config: Config, world: int, machine: Machine, backward: float, shared: float) -> list[Exchanged]:
    """Times of all collectives of a step, and how much of them the step waits for.

    Args:
        backward: time of a micro-batch's backward pass.
        shared: time of the shared experts' forward pass in a block.
    """
    layout = layout_of(config, world)
    zero = deepspeed_config(config, world)["zero_optimization"]
    overlaps = machine.device == "cuda" and bool(zero.get("overlap_comm")) and config.parallel.zero_stage > 0
    reductions = config.training.accumulation if config.parallel.zero_stage == 2 else 1
    found = []
    for row in step_traffic(config, world):
        place = place_of(row.group, layout, machine.per_node)
        one = collective_seconds(row.kind, row.sent / row.count, place, machine, world)  # type: ignore[arg-type]
        exposed = one * row.count
        if row.why == "gradients" and overlaps:
            buckets = row.count // reductions
            exposed = reductions * min(buckets * one, exposed_seconds(one, buckets, backward))
        elif row.why == "tokens" and machine.device == "cuda":
            # Of the passes through a layer, forward ones have a dispatch each: 1 of 4 exchanges, or 2 of 6.
            share = 1 / 3 if config.training.activation_checkpointing else 1 / 4
            exposed -= share * row.count * min(one, shared)
        if row.ranks > 1:
            found.append(Exchanged(row, one * row.count, exposed))
    return found
