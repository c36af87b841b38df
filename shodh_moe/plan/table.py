"""What ``shodh plan`` prints about time and layouts."""

from __future__ import annotations

from collections.abc import Sequence

from shodh_moe.config import Config
from shodh_moe.plan.layouts import Choice, Comparison, reason
from shodh_moe.plan.machine import Machine, assumptions
from shodh_moe.plan.predict import Prediction
from shodh_moe.plan.simulate import EVEN, QUANTILES, Stragglers, simulate

SHOWN = 5  # layouts in the table


def time_table(config: Config, world: int, machine: Machine, found: Prediction) -> str:
    """Return the lines about the configured layout: step time by part, throughput and the length of the run."""
    hours = config.training.steps * found.step / 3600
    what = "computed from data sheets and assumptions, not measured" if machine.source == "data sheets" else "computed"
    lines = {"step time": f"{1e3 * found.step:,.1f} ms on {machine.name} ({what}), of which"}
    for name, share in found.limits:
        if share >= 0.0005:
            lines[f"  {name}"] = f"{1e3 * share * found.step:,.1f} ms, {share:.1%}"
    device = "GPU" if machine.device == "cuda" else "rank"
    lines["exchanges"] = f"{found.exchanges / found.step:.1%} of the step"
    lines["tokens per second"] = (
        f"{found.tokens / found.step:,.0f}, {found.tokens / found.step / world:,.0f} per {device}"
    )
    lines["pretraining"] = (
        f"{hours:,.1f} hours, {hours * world:,.0f} {device} hours, without validation and checkpoints"
    )
    width = max(len(name) for name in lines) + 2
    return "\n".join(f"{name:<{max(18, width)}}{text}" for name, text in lines.items())


def layout_table(comparison: Comparison, machine: Machine, world: int) -> str:
    """Return the fastest layouts, what limits each, and the settings of the fastest."""
    best = comparison.choices[0]
    rows = [["", "EP", "ZeRO", "exchange", "checkpointing", "micro-batch", "step ms", "memory GB", "exchanges", "why"]]
    rows += [_row(str(place), one, best) for place, one in enumerate(comparison.choices[:SHOWN], 1)]
    rows.append(_row("config", comparison.configured, best))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    fit = f"{len(comparison.choices)} of {comparison.considered} layouts of {world} ranks fit"
    memory = f" {machine.memory / 1e9:.0f} GB per rank" if machine.memory else ""
    lines = [f"layouts: {fit}{memory}; all make the same step", *table, f"the fastest: {best.layout.settings}"]
    if machine.source == "data sheets":
        lines.append(f"assumed: {assumptions()}")
    return "\n".join(lines)


def _row(name: str, choice: Choice, best: Choice) -> list[str]:
    layout, found = choice.layout, choice.prediction
    micro_batch = f"{layout.micro_batch} x {layout.accumulation}"
    numbers = [f"{1e3 * found.step:.1f}", f"{found.memory / 1e9:.1f}", f"{found.exchanges / found.step:.1%}"]
    checkpointing = "yes" if layout.checkpointing else "no"
    start = [name, str(layout.ep), str(layout.zero), layout.exchange, checkpointing, micro_batch]
    return [*start, *numbers, reason(choice, best)]


def spread_table(
    config: Config, world: int, machine: Machine, load_E: Sequence[float] | None, steps: int, seed: int
) -> str:
    """Return the lines that ``shodh plan --simulate`` prints: with both causes of a spread, and with each alone."""
    experts = config.model.moe.num_experts
    drawn = load_E if load_E is not None else [1.0] * max(experts, 1)
    cases = {
        "stragglers and uneven experts": (Stragglers(), drawn),
        "stragglers alone": (Stragglers(), None),
        "uneven experts alone": (EVEN, drawn),
    }
    lines = {}
    for name, (stragglers, load) in cases.items():
        if name == "uneven experts alone" and not experts:
            continue
        found = simulate(config, world, machine, stragglers, load, steps, seed)
        times = ", ".join(f"{share:.0%} {1e3 * found.quantile(share):,.1f}" for share in QUANTILES)
        slower = found.mean / found.predicted - 1
        lines[name] = f"mean {1e3 * found.mean:,.1f} ms ({slower:+.1%} of the prediction), quantiles {times} ms"
    s = Stragglers()
    lines["assumed"] = (
        f"a rank's speed varies by {s.ranks:.0%} and a step's by {s.steps:.0%} (log-normal), a rank stalls for "
        f"{s.stall:g} s with probability {s.stall_chance:g} in a step; "
        + ("each sample draws its expert from the given load" if load_E is not None else "experts are drawn evenly")
    )
    head = f"simulated: {steps} steps of {world} ranks, seed {seed}"
    return "\n".join([head, *(f"  {name:<31}{text}" for name, text in lines.items())])
