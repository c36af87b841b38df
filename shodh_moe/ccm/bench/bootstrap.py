"""Means and intervals of errors that depend on the seed of the training and on the trajectory.

The bootstrap is hierarchical and paired: a resample draws seeds, and the trajectories of each regime, with replacement,
and uses the same ones for all rows, so that what is hard for all rows alike does not widen the interval of a
difference. All seeds see the same trajectories, so one draw of trajectories serves all seeds of a resample.

Arrays over B = 1 + resamples hold the data as they are at index 0 and the resamples behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
COVERAGE = 0.95


def weights(count: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """How much each of ``count`` things counts: [B, count], rows sum to 1; row 0 counts all equally."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def means(errors_SN: Array, seeds_BS: Array, trajectories_BN: Array) -> Array:
    """Mean error of each resample: [B]. Infinite where it drew an infinite error."""
    finite = np.isfinite(errors_SN)
    # 0 * inf is NaN: an infinite error that a resample did not draw must not count.
    mean_B = np.einsum("bs,sn,bn->b", seeds_BS, np.where(finite, errors_SN, 0.0), trajectories_BN, optimize=True)
    drew_B = np.einsum("bs,sn,bn->b", seeds_BS, (~finite).astype(float), trajectories_BN, optimize=True) > 0
    return np.where(drew_B, np.inf, mean_B)


def reduction(errors_B: Array, base_B: Array) -> Array:
    """1 - error / error of the base: [B]; NaN where the base is infinite or 0: it is no measure then."""
    usable = np.isfinite(base_B) & (base_B > 0)
    return np.where(usable, 1 - errors_B / np.where(usable, base_B, 1.0), np.nan)


def estimate(values_B: Array) -> dict[str, Any]:
    """``value`` of the data and the ends ``low`` and ``high`` of its 95 % interval (percentiles of the resamples)."""
    # Order statistics, not interpolated ones: between infinite values there is nothing to interpolate.
    resampled = np.sort(values_B[1:])
    outside = (1 - COVERAGE) / 2 * len(resampled)
    low, high = resampled[math.floor(outside)], resampled[len(resampled) - 1 - math.floor(outside)]
    return {"value": float(values_B[0]), "low": float(low), "high": float(high)}
