"""What a rehearsal recorded, and what of it is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from shodh_moe.config import Config
from shodh_moe.rehearsal.allowed import FLOAT32_PHASES, WIDE, may_wait
from shodh_moe.runs.plan import memory
from shodh_moe.runs.traffic import step_traffic

MEMORY = 0.05  # largest relative difference between the plan's memory and the rehearsal's
STEP = "step"  # the phase whose memory and collectives the plan predicts


@dataclass
class Findings:
    """The records of one rank.

    Attributes:
        rank, world: which rank of how many.
        peak: largest number of bytes on the device, by phase.
        waits: phase, file and function, operation, and number of times.
        collectives: phase, group, kind, number and bytes (see `Watch`).
        products: phase, file and function, operation, dtypes, and number of matrix products.
        error: what stopped the rehearsal, in one line; "" if nothing did.
    """

    rank: int
    world: int
    peak: dict[str, int] = field(default_factory=dict)
    waits: list[tuple[str, str, str, int]] = field(default_factory=list)
    collectives: list[tuple[str, str, str, int, int]] = field(default_factory=list)
    products: list[tuple[str, str, str, str, int]] = field(default_factory=list)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def problems(found: Findings, config: Config) -> list[str]:
    """Return what is wrong with a rehearsal of the config, a line for each finding; [] if nothing is."""
    if found.error:
        return [found.error]
    return [*_waits(found), *_dtypes(found, config), *_traffic(found, config), *_memory(found, config)]


def _waits(found: Findings) -> list[str]:
    return [
        f"{phase}: {place} waits for the device, {count} times: {what}"
        for phase, place, what, count in found.waits
        if not may_wait(phase, place)
    ]


def _dtypes(found: Findings, config: Config) -> list[str]:
    """Products whose inputs do not have the dtype of ``training.precision`` (``tokenizer.precision``)."""
    lines: list[str] = []
    wide: Counter[str] = Counter()
    for phase, place, operation, dtypes, count in found.products:
        precision = config.tokenizer.precision if phase.startswith("tokenizer") else config.training.precision
        if precision in dtypes or phase.rpartition(" ")[2] in FLOAT32_PHASES:
            continue
        backward = place.startswith("deepspeed") and "backward" in place
        if backward or place in WIDE:
            # Each product of two matrices has at most two in the backward pass.
            wide[phase] += count if backward else -2 * count
        else:
            lines.append(f"{phase}: {place} multiplies in {dtypes} and not in {precision}: {operation}, {count} times")
    lines += [
        f"{phase}: the backward pass has {excess} products that are not in the training's precision and belong to no "
        "product of the forward pass"
        for phase, excess in wide.items()
        if excess > 0
    ]
    return lines


def _traffic(found: Findings, config: Config) -> list[str]:
    recorded = {row[1:3]: row[3:] for row in found.collectives if row[0] == STEP}
    planned: dict[tuple[str, str], tuple[int, int]] = {}
    for row in step_traffic(config, found.world):
        count, sent = planned.get((row.group, row.kind), (0, 0))
        planned[row.group, row.kind] = (count + row.count, sent + row.sent)
    return [
        f"{STEP}: {kind} in the group {group}: {_amount(recorded.get((group, kind)))}, but the plan has "
        f"{_amount(planned.get((group, kind)))}"
        for group, kind in sorted(recorded.keys() | planned.keys())
        if tuple(recorded.get((group, kind), ())) != planned.get((group, kind), ())
    ]


def _amount(row: tuple[int, int] | None) -> str:
    return f"{row[0]} with {row[1]:,} bytes" if row else "none"


def planned_memory(config: Config, world: int) -> int:
    """The plan's bytes on a device, if the samples of all ranks are exchanged evenly, as in a rehearsal."""
    even = config.parallel.model_copy(update={"exchange_capacity": 1.0})
    return memory(config.model_copy(update={"parallel": even}), world)["sum"]


def _memory(found: Findings, config: Config) -> list[str]:
    planned, peak = planned_memory(config, found.world), found.peak[STEP]
    if abs(peak / planned - 1) <= MEMORY:
        return []
    return [f"{STEP}: {peak / 2**30:.2f} GiB on the device, but the plan has {planned / 2**30:.2f} GiB"]
