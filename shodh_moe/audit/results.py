"""Group the audit's results by set, arm and seed, and estimate means and relative differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from scipy import stats

from shodh_moe.audit.arm_models import ARMS
from shodh_moe.base.errors import UserError

SETS = ("main", "long", "hard", "four", "bed")

Run = dict[str, Any]  # content of a result file
Seeds = dict[int, Run]  # the runs of one arm, by seed
Sets = dict[str, dict[str, Seeds]]  # by set and arm name
QUANTITIES = ("latent_mse", "physical_mse", "velocity_vrmse")  # the first is what training minimises
MIN_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        value: the mean over the seeds that did not diverge; None if there are none.
        low, high: ends of the 95 % interval; None with fewer than `MIN_SEEDS` seeds or a diverged one.
        by_seed: the values averaged.
        diverged: seeds that have no value because a run diverged.
    """

    value: float | None
    low: float | None
    high: float | None
    by_seed: dict[int, float] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)


def estimate(by_seed: Mapping[int, float | None]) -> Estimate:
    """Mean and two-sided Student t interval, mean +- t(0.975, n - 1) s / sqrt(n), over seeds only.

    Args:
        by_seed: a value for each seed; None or not finite where a run diverged.
    """
    found = {seed: value for seed, value in sorted(by_seed.items()) if value is not None and math.isfinite(value)}
    diverged = sorted(set(by_seed) - set(found))
    values = list(found.values())
    if not values:
        return Estimate(None, None, None, {}, diverged)
    mean = fmean(values)
    if len(values) < MIN_SEEDS or diverged:
        return Estimate(mean, None, None, found, diverged)
    # Scaled here: with a scale of 0 (all values equal) SciPy returns NaN.
    low, high = (mean + float(end * stats.sem(values)) for end in stats.t.interval(CONFIDENCE, len(values) - 1))
    return Estimate(mean, low, high, found, diverged)


def relative_difference(errors: Mapping[int, float | None], base: Mapping[int, float | None]) -> Estimate:
    """Estimate (error - base) / base over the seeds that both arms have; positive if the arm is worse than its base.

    With single-domain models as the base, this is the arm's negative transfer (no unit; 0.1 means 10 % more error).

    Args:
        errors: errors of the arm by seed; None where its run diverged.
        base: errors of the arm to compare with; None where its run diverged. A base error of 0 counts as diverged.
    """
    differences: dict[int, float | None] = {}
    for seed in sorted(set(errors) & set(base)):
        error, reference = errors[seed], base[seed]
        differences[seed] = None if error is None or not reference else (error - reference) / reference
    return estimate(differences)


def arm_name(run: Run) -> str:
    """Name of a run's arm within its set: the arm, ``moe_4`` if the number of experts varies, ``single:<domain>``."""
    if run["arm"] == "single":
        return f"single:{run['domains'][0]}"
    return f"moe_{run['experts']}" if run["set"] == "four" and run["arm"] == "moe" else str(run["arm"])


def by_arm(results: list[Run]) -> Sets:
    """Group the runs by set, arm name and seed, in the order of the tables.

    Raises:
        UserError: two results have the same set, arm and seed, or an arm or set is unknown.
    """
    for run in results:
        if run["arm"] not in ARMS or run["set"] not in SETS:
            raise UserError(
                f"the result of {run['run']} has an unknown arm or set ({run['arm']}, {run['set']}): "
                f"arms are {', '.join(ARMS)}; sets are {', '.join(SETS)}"
            )
    found: Sets = {}

    def place(run: Run) -> tuple[int, int, int, str, int]:
        return SETS.index(run["set"]), list(ARMS).index(run["arm"]), run["experts"] or 0, arm_name(run), run["seed"]

    for run in sorted(results, key=place):
        seeds = found.setdefault(run["set"], {}).setdefault(arm_name(run), {})
        if run["seed"] in seeds:
            where = f"{run['set']}, {arm_name(run)}, seed {run['seed']}"
            raise UserError(f"there are two results of {where}: leave one out")
        seeds[run["seed"]] = run
    return found


def arms_of(sets: Sets) -> Iterator[tuple[str, str, Seeds]]:
    """Yield set, arm name and runs of every arm."""
    for name, arms in sets.items():
        for arm, seeds in arms.items():
            yield name, arm, seeds


def domains_of(seeds: Seeds) -> list[str]:
    """The domains that the runs of an arm were trained on."""
    return list(next(iter(seeds.values()))["domains"])


def error_of(seeds: Seeds, domain: str, quantity: str) -> dict[int, float | None]:
    """One error by seed; None where the run diverged."""
    return {s: None if run["diverged"] else run["errors"][domain].get(quantity) for s, run in seeds.items()}


def measured(seeds: Seeds, get: Callable[[Run], float | None]) -> Estimate:
    """Estimate a value that some runs may lack. Runs without it are skipped; diverged runs count as diverged."""
    values = {seed: None if run["diverged"] else get(run) for seed, run in seeds.items()}
    return estimate({seed: v for seed, v in values.items() if v is not None or seeds[seed]["diverged"]})


def finished(seeds: Seeds) -> Seeds:
    """The runs that did not diverge."""
    return {seed: run for seed, run in seeds.items() if not run["diverged"]}
