"""When CCM is worth it: what each way to a network for new regimes costs, and what error it has.

The user has an anchor and the experts at both ends, and wants N further regimes. Costs are those that the benchmark
measured, for one seed: CPU time, or GPU time if it ran on GPUs. What was not measured by itself is estimated from the
time of a training step, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from shodh_moe.ccm.bench.aims import family_title
from shodh_moe.ccm.bench.config import BenchConfig, FamilyBench
from shodh_moe.ccm.readout import BANK
from shodh_moe.report import page
from shodh_moe.report.page import Block, Section, Text
from shodh_moe.report.table import Table

REGIMES = (1, 3, 10, 30, 100)
WAYS = {
    "coordinate": "CCM, coordinate",
    "prefix": "CCM, prefix",
    "conditioned": "conditioned network",
    "frames": "fine-tuned on K frames",
    "expert": "fine-tuned on a training set",
    "anew": "trained anew",
}
ROW = {
    "coordinate": "ccm_coordinate",
    "prefix": "ccm_prefix",
    "conditioned": "conditioned",
    "frames": "fine_tuned",
}  # rows of the benchmark with their errors; it has none for the others
TUNED_ALPHAS = len(BANK) + 11  # that prefix tries: the bank, 9 by golden section, 2 beside the best


def costs(family: dict[str, Any], one: FamilyBench, gpu: bool) -> dict[str, dict[str, Any]]:
    """For each of `WAYS`: seconds ``once`` and for ``each`` regime, and whether they are ``estimated``.

    Args:
        family: the family's entry in `summarise`.
        one: its config.
        gpu: whether it ran on GPUs, so that wall time counts.
    """
    stages: dict[str, float] = family["wall_seconds" if gpu else "cpu_seconds"]
    seeds, seconds = len(family["seeds"]), family.get("seconds", {})
    of_one = {role: stages[role] / seeds for role in ("anchor", "low", "high", "conditioned")}
    expert = fmean((of_one["low"], of_one["high"]))
    training = one.endpoint.training
    steps = training.steps * training.batch_size * fmean(one.endpoint.rollout)
    sample = expert / steps  # seconds to train on one step of one sample
    tuning = one.fine_tuning.steps * one.fine_tuning.batch_size * sample
    # A prediction without gradients takes about a third of a training step.
    samples = TUNED_ALPHAS * _trajectories(one) * (one.frames - one.network.history)
    data = _data_seconds(stages.get("data", 0.0), one)
    return {
        "coordinate": _cost(each=seconds.get("merge", 0.0), estimated="merge" not in seconds),
        "prefix": _cost(each=seconds.get("prefix", samples * sample / 3), estimated="prefix" not in seconds),
        "conditioned": _cost(once=of_one["conditioned"]),
        "frames": _cost(each=seconds.get("fine_tuned", tuning), estimated="fine_tuned" not in seconds),
        "expert": _cost(each=expert + data),
        "anew": _cost(each=of_one["anchor"] + data),
    }


def _cost(once: float = 0.0, each: float = 0.0, estimated: bool = False) -> dict[str, Any]:
    return {"once": once, "each": each, "estimated": estimated}


def _trajectories(one: FamilyBench) -> int:
    family = one.family.family()
    return family.trajectories.get("ood_low", 16)


def _data_seconds(total: float, one: FamilyBench) -> float:
    """Seconds to simulate the training set of one regime; 0 for data that were not simulated."""
    family = one.family.family()
    if one.family.source or not total:
        return 0.0
    made = sum(family.trajectories[split] * len(places) for split, places in family.coordinates.items())
    return total * family.trajectories["endpoint_low"] / made


def break_even(way: dict[str, Any], conditioned: dict[str, Any]) -> float:
    """The number of regimes from which on the conditioned network is cheaper; infinite if never."""
    return conditioned["once"] / way["each"] if way["each"] else math.inf


def markdown(summary: dict[str, Any]) -> str:
    """The page, from the content of ``summary.json``."""
    config = BenchConfig.model_validate(summary["config"])
    gpu = bool(summary["environment"].get("devices"))
    sections = [Section("When is it worth it", list(_introduction(summary, gpu)))]
    for key, family in summary["families"].items():
        title = family_title(key)
        sections.append(Section(title[0].upper() + title[1:], list(_family(family, config.families[key], gpu))))
    sections.append(Section("Rule of thumb", list(_rules(summary, config, gpu))))
    return page.markdown(sections)


def _introduction(summary: dict[str, Any], gpu: bool) -> Iterator[Block]:
    where = summary["environment"]
    device = ", ".join(map(str, where.get("devices", []))) if gpu else f"{where['cores']} cores of {where['processor']}"
    yield Text(
        "You have an anchor and experts at both ends of a range, and want predictions in N regimes beyond them. CCM "
        "merges the experts that are there. The alternatives are a network that is given the parameter (it needs all "
        "training data, and an input for the parameter), fine-tuning the anchor for each regime (on the first K "
        "frames, or on a training set that must be simulated first), and training a network anew for each (as long as "
        "the anchor, on such a training set)."
    )
    yield Text(
        f"Measured on {device}: {'GPU' if gpu else 'CPU'} time of one seed, without the anchor and the experts. "
        "Numbers with ~ are estimated from the time of a training step (a merge: nothing). Errors are OOD nRMSE; the "
        "benchmark has none for the last two ways. This page is made from summary.json by shodh_moe/ccm/bench/worth.py."
    )


def _family(family: dict[str, Any], one: FamilyBench, gpu: bool) -> Iterator[Block]:
    found = costs(family, one, gpu)
    lines = []
    for way, cost in found.items():
        mark = "~" if cost["estimated"] else ""
        times = [mark + _hours(cost["once"] + n * cost["each"]) for n in REGIMES]
        estimate = family["rows"].get(ROW.get(way, ""), {}).get("ood", {}).get("value")
        error = "-" if estimate is None else f"{estimate:#.3g}"
        even = break_even(cost, found["conditioned"])
        cheaper = "-" if way == "conditioned" else "never" if math.isinf(even) else f"{mark}{math.ceil(even)}"
        lines.append([WAYS[way], *times, cheaper, error])
    unit = "GPU" if gpu else "CPU"
    head = ["way", *(f"N = {n}, {unit} hours" for n in REGIMES), "conditioning is cheaper from N", "OOD error"]
    yield Table(head, lines, frozenset(range(1, len(head))))


def _rules(summary: dict[str, Any], config: BenchConfig, gpu: bool) -> Iterator[Block]:
    yield Text(
        "Errors of CCM (coordinate) relative to the anchor and to the conditioned network: mean over regimes between "
        "the ends and beyond them. Straight: |alpha| up to which predictions stay near the line, smallest of the seeds."
    )
    lines = []
    for key, family in summary["families"].items():
        cells = []
        for group in ("interpolation", "ood"):
            ours = family["rows"]["ccm_coordinate"].get(group, {}).get("value")
            for base in ("anchor", "conditioned"):
                other = family["rows"].get(base, {}).get(group, {}).get("value")
                cells.append(f"{ours / other:.2f}" if ours is not None and other else "-")
        straight = min(family["straight_to"].values(), default=None)
        lines.append([family_title(key), *cells, "-" if straight is None else f"{straight:g}"])
    bases = [f"{place}, / {base}" for place in ("between", "beyond") for base in ("anchor", "conditioned")]
    head = ["family", *bases, "straight"]
    yield Table(head, lines, frozenset(range(1, len(head))))
    for rule in rules(summary, config, gpu):
        yield Text(rule)


def rules(summary: dict[str, Any], config: BenchConfig, gpu: bool = False) -> Iterator[str]:
    """Sentences that follow from the measured numbers."""
    families = summary["families"]
    beyond = [_ratio(one, "ood", "anchor") for one in families.values()]
    if all(ratio is not None and ratio < 1 for ratio in beyond):
        yield (
            f"Beyond the ends, merging the experts that you have leaves {min(beyond):.0%} to {max(beyond):.0%} of the "  # type: ignore[type-var]
            "anchor's error, at no training: do it first."
        )
    worse = [family_title(k) for k, one in families.items() if (_ratio(one, "interpolation", "anchor") or 0) > 1]
    if worse:
        yield (
            f"Between the ends, keep the anchor where it already sees the regime in its input: on {', '.join(worse)} "
            "it is better than CCM there."
        )
    ratios = [ratio for one in families.values() if (ratio := _ratio(one, "ood", "conditioned")) is not None]
    ways = [costs(one, config.families[key], gpu) for key, one in families.items()]
    even = [break_even(way["expert"], way["conditioned"]) for way in ways]
    if ratios and all(map(math.isfinite, even)):
        yield (
            f"Train a conditioned network if its training data are at hand and you need {min(ratios):.1f} to "
            f"{max(ratios):.1f} times smaller errors: it costs as much as fine-tuning experts for "
            f"{math.ceil(min(even))} to {math.ceil(max(even))} regimes."
        )


def _ratio(family: dict[str, Any], group: str, base: str) -> float | None:
    ours, other = (family["rows"].get(row, {}).get(group, {}).get("value") for row in ("ccm_coordinate", base))
    return ours / other if ours is not None and other else None


def _hours(seconds: float) -> str:
    return "0" if seconds == 0 else f"{seconds / 3600:.2g}"
