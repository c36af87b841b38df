"""Comparison of the checkpoints of two runs."""

from __future__ import annotations

from pathlib import Path

import torch

from shodh_moe.checkpoint import CheckpointReader


def check_same_weights(run: Path, other: Path, step: int) -> None:
    """Check that the checkpoints of two runs at ``step`` have equal tensors, bit for bit."""
    a, b = (CheckpointReader(folder / "checkpoints" / str(step)) for folder in (run, other))
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in b.names())
