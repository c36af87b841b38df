"""Spread and coverage of an ensemble's predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = (0.5, 0.9)  # nominal shares of the truth within the interval


def mean_and_spread(members: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation over the members, element by element; the spread of one member is 0."""
    stacked = torch.stack(members)
    mean = stacked.mean(0)
    return mean, stacked.std(0) if len(members) > 1 else torch.zeros_like(mean)


def half_width(level: float, members: int) -> float:
    """Half the width of a prediction interval in units of the spread.

    It holds a further draw from the members' distribution with probability ``level``, if that is normal: Student's t
    with n - 1 degrees of freedom, times sqrt(1 + 1/n).
    """
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, members - 1)) * math.sqrt(1 + 1 / members)


def coverage(mean: Tensor, spread: Tensor, truth: Tensor, level: float, members: int) -> float:
    """Share of the elements whose truth is within the interval of `half_width` around the mean."""
    return covered((truth - mean).abs(), spread, half_width(level, members))


def covered(error: Tensor, spread: Tensor, factor: float) -> float:
    """Share of the absolute errors that are at most ``factor`` times their spread."""
    return float((error <= factor * spread).double().mean())
