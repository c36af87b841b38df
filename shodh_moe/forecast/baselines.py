"""Forecasts without a trained model: persistence, linear extrapolation, and the mean at the same phase of the drive.

Shapes: T observed snapshots, N forecast ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shodh_moe.forecast.data import Flow

PERSISTENCE, LINEAR, PHASE_MEAN = "persistence", "linear extrapolation", "phase mean"


def persistence(flow: Flow, steps: int) -> Tensor:
    """Nothing changes: the last snapshot, [N, 4, X, Y, Z]."""
    return flow.fields_T4XYZ[-1:].expand(steps, -1, -1, -1, -1)


def linear_extrapolation(flow: Flow, steps: int) -> Tensor:
    """The last change goes on: x + n (x - x before), [N, 4, X, Y, Z]. Needs two observed snapshots."""
    before, last = flow.fields_T4XYZ[-2:]
    ahead = torch.arange(1, steps + 1, dtype=last.dtype)[:, None, None, None, None]
    return last + ahead * (last - before)


def phase_mean(flow: Flow, steps: int, period: float) -> Tensor:
    """The mean of the observed snapshots at the same phase of a drive with this period, [N, 4, X, Y, Z].

    Snapshots count as at the same phase if it differs by at most half a snapshot. If there is none, those that are
    nearest in phase count. All snapshots since the start of the trajectory are observed; the trained models see only
    the last ones.

    Args:
        period: in snapshots, not necessarily whole.
    """
    observed = len(flow.fields_T4XYZ)
    numbers = torch.arange(observed, dtype=torch.float64)
    forecast = []
    for snapshot in range(observed, observed + steps):
        apart = torch.remainder(snapshot - numbers, period)
        apart = torch.minimum(apart, period - apart)
        same = apart <= max(0.5, float(apart.min())) + 1e-9
        forecast.append(flow.fields_T4XYZ[same].mean(0))
    return torch.stack(forecast)
