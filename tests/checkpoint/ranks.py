"""The checkpoint writers of several ranks in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.checkpoint import CheckpointWriter, Fragment

TENSORS = {"model/a.weight": torch.arange(12.0).view(3, 4), "exp_avg/a.weight": torch.arange(12.0).neg().view(3, 4)}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def rank_share(tensors: dict[str, Tensor], rank: int, world_size: int) -> list[Fragment]:
    """Return this rank's share of tensors that are each divided into ``world_size`` runs."""
    fragments = []
    for name, tensor in tensors.items():
        bounds = [tensor.numel() * r // world_size for r in (rank, rank + 1)]
        fragments.append(Fragment(name, bounds[0], tensor.view(-1)[slice(*bounds)]))
    return fragments


class Ranks:
    """All ranks of one attempt of a run."""

    def __init__(self, folder: Path, world_size: int = 2, attempt: str = "first", keep_last: int = 9, **keep: int):
        self.writers = [
            CheckpointWriter(folder, rank, world_size, keep_last, keep.get("every", 0), attempt)
            for rank in range(world_size)
        ]

    def save(self, step: int, tensors: dict[str, Tensor] | None = None, **facts: Any) -> None:
        """Start saving on every rank."""
        tensors = TENSORS if tensors is None else tensors
        world_size = len(self.writers)
        for rank, writer in enumerate(self.writers):
            state = {"rng/cpu": torch.full((5,), rank, dtype=torch.uint8)}
            writer.save(step, rank_share(tensors, rank, world_size), shapes_of(tensors), state, facts)

    def errors(self) -> list[BaseException | None]:
        """Return the error that `finish` raises on each rank, or None."""
        found: list[BaseException | None] = []
        for writer in self.writers:
            try:
                writer.finish()
                found.append(None)
            except Exception as error:
                found.append(error)
        return found

    def saved(self, step: int, tensors: dict[str, Tensor] | None = None, **facts: Any) -> Ranks:
        """Save, and wait until every rank has succeeded."""
        self.save(step, tensors, **facts)
        assert self.errors() == [None] * len(self.writers)
        return self
