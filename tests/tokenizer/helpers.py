"""Functions shared by the tests of the tokenizer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shodh_moe.data import list_trajectories
from shodh_moe.data.loader import Snapshots


def rms(x: Tensor) -> float:
    """Return the root mean square of all values, computed in float64."""
    return float(x.double().square().mean().sqrt())


def snapshots(dataset: Path) -> Snapshots:
    """Return the training snapshots of a dataset."""
    return Snapshots(list_trajectories(dataset, "train"))
