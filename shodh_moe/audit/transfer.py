"""Negative transfer and other relative differences between arms, paired by seed, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.stats import t as student_t

QUANTITIES = ("latent_mse", "physical_mse", "velocity_vrmse")  # the first is what training minimises
MIN_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds.

    Attributes:
        value: the mean over the seeds that did not diverge; None if there is none.
        low: lower end of the 95 % interval. None, as is ``high``, with fewer than `MIN_SEEDS` seeds or a diverged one.
        high: upper end.
        by_seed: what the mean is of.
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
    half = float(student_t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, found, diverged)


def relative_difference(errors: Mapping[int, float | None], base: Mapping[int, float | None]) -> Estimate:
    """(error - base) / base of each seed that both arms have: positive if the arm is worse than its base.

    With single-domain models as the base this is the negative transfer of the arm (no unit; 0.1 is 10 % more error).

    Args:
        errors: of the arm, by seed; None where its run diverged.
        base: of what it is compared with; None where that run diverged. At 0 there is no relative difference.
    """
    differences: dict[int, float | None] = {}
    for seed in sorted(set(errors) & set(base)):
        error, reference = errors[seed], base[seed]
        differences[seed] = None if error is None or not reference else (error - reference) / reference
    return estimate(differences)
