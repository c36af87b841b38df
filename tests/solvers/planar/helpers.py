"""Functions shared by the tests of the planar solvers."""

from __future__ import annotations

import numpy as np
import torch

from shodh_moe.solvers import trajectory_seed


def seeds(count: int, first: int = 0) -> list[np.random.SeedSequence]:
    """Return the seeds of ``count`` trajectories."""
    return [trajectory_seed(0, "test", first + index) for index in range(count)]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())
