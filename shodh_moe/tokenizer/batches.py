"""Batches for the tokenizer's training: each snapshot is transformed by a random symmetry of its flow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shodh_moe.data.loader import Snapshots, read_batches, reading_threads
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.data.symmetry import Symmetry, apply_each

# Indices of snapshots, and the symmetry applied to each.
Draw = tuple[list[int], list[Symmetry]]


def draw(train: Snapshots, sampler: DomainSampler | None, batch_size: int, seed: int, step: int) -> Draw:
    """Draw the batch of a step, uniformly or with a sampler; each snapshot gets a random symmetry.

    If the dataset has fewer snapshots than a batch, some are repeated.
    """
    rng = np.random.default_rng([seed, step])  # seeded by step, so that a resumed training continues the same order
    if sampler is None:
        picks = [int(i) for i in rng.choice(len(train), size=batch_size, replace=len(train) < batch_size)]
    else:
        picks = train.indices(sampler.batch(step, rank=0))
    return picks, [Symmetry.draw_for(rng, train.record(pick)) for pick in picks]


def share(batch: Draw, rank: int, ranks: int) -> Draw:
    """Return the part of a batch that belongs to ``rank``."""
    picks, symmetries = batch
    return picks[rank::ranks], symmetries[rank::ranks]


def drawn_batches(
    snapshots: Snapshots, draws: Iterable[Draw], device: torch.device | str
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield each draw's snapshots under their symmetries, [B, 5, X, Y, Z] on ``device``, read ahead."""
    here, ahead = itertools.tee(draws)
    read = on_device(snapshots, (picks for picks, _ in ahead), device)
    for (picks, symmetries), fields in zip(here, read, strict=True):
        yield picks, apply_each(symmetries, fields)


def on_device(snapshots: Snapshots, batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Tensor]:
    """Yield batches of unchanged snapshots, [B, 5, X, Y, Z] on ``device``, read ahead."""
    gpu = torch.device(device).type == "cuda"
    for fields in read_batches(snapshots, batches, reading_threads(), pin=gpu):
        yield fields.to(device, non_blocking=gpu)
