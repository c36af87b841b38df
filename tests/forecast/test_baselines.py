"""The baselines are exact where they should be, and the flows begin where they should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shodh_moe.forecast.baselines import linear_extrapolation, persistence, phase_mean
from shodh_moe.forecast.data import Flow, begins

SHAPE = (4, 2, 3, 2)


def flow(values_T: Tensor) -> Flow:
    """A flow whose fields all have the same value at a time."""
    return Flow(values_T[:, None, None, None, None].expand(-1, *SHAPE), torch.zeros(1, *SHAPE[1:]), "any")


def values(forecast_N4XYZ: Tensor) -> list[float]:
    assert forecast_N4XYZ.shape[1:] == SHAPE
    assert (forecast_N4XYZ == forecast_N4XYZ[:, :1, :1, :1, :1]).all()
    return forecast_N4XYZ[:, 0, 0, 0, 0].tolist()


def test_persistence_repeats_the_last_snapshot() -> None:
    assert values(persistence(flow(torch.tensor([1.0, 3.0])), 3)) == [3.0, 3.0, 3.0]


def test_linear_extrapolation_is_exact_on_a_linear_flow() -> None:
    line = 2.0 + 0.5 * torch.arange(12)
    assert values(linear_extrapolation(flow(line[:3]), 9)) == line[3:].tolist()


def test_the_phase_mean_is_exact_on_a_periodic_flow() -> None:
    wave = torch.sin(2 * math.pi * torch.arange(30) / 10).float()
    assert values(phase_mean(flow(wave[:15]), 10, 10.0)) == pytest.approx(wave[15:25].tolist(), abs=1e-6)


def test_the_phase_mean_averages_what_was_observed_at_the_same_phase() -> None:
    found = values(phase_mean(flow(torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])), 2, 2.0))
    assert found == [15.0, 3.0]


def test_a_phase_that_was_never_observed_takes_the_nearest() -> None:
    """Snapshots 0 and 1 are observed: 2 to 5 are nearest in phase to 1, 6 to 10 to 0, and 11 is at the phase of 1."""
    found = values(phase_mean(flow(torch.tensor([7.0, 9.0])), 10, 10.0))
    assert found == [9.0] * 4 + [7.0] * 5 + [9.0]


def test_half_a_period_between_two_snapshots_is_their_mean() -> None:
    found = values(phase_mean(flow(torch.tensor([1.0, 2.0, 4.0, 8.0])), 1, 2.5))
    assert found == [3.0]  # snapshot 4 is at 1.5: between 1 and 2


def test_forecasts_begin_evenly_spaced_between_the_first_and_the_last_possible() -> None:
    assert begins(24, 2, 10, 1) == [2]
    assert begins(24, 2, 10, 4) == [2, 6, 10, 14]
    assert begins(12, 2, 10, 4) == [2]
    assert begins(13, 2, 10, 4) == [2, 3]
