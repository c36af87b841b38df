"""The snapshots of a tokenizer training step, and their symmetries."""

from __future__ import annotations

from pathlib import Path

import torch

from shodh_moe.data.sampler import DomainSampler
from shodh_moe.tokenizer.batches import draw, drawn_batches, share
from tests.tokenizer.helpers import snapshots


def test_training_snapshots_are_transformed_by_random_symmetries(dataset: Path) -> None:
    data = snapshots(dataset)
    draws = [draw(data, None, 4, seed=0, step=step) for step in range(3)]
    assert draws == [draw(data, None, 4, seed=0, step=step) for step in range(3)], "a step alone decides"
    assert len({tuple(picks) for picks, _ in draws}) == 3
    for (picks, symmetries), (read, fields) in zip(draws, drawn_batches(data, draws, "cpu"), strict=True):
        assert read == picks
        assert len(set(picks)) == len(set(symmetries)) == 4
        plain = data.batch(picks)
        assert not torch.equal(fields, plain)
        torch.testing.assert_close(fields.abs().flatten(1).sort()[0], plain.abs().flatten(1).sort()[0])


def test_weights_mix_the_domains_of_a_batch(dataset: Path) -> None:
    data = snapshots(dataset)
    sampler = DomainSampler(data.sizes, 4, seed=0, weights=(3, 1))
    drawn = [data.labels(draw(data, sampler, 4, seed=0, step=step)[0]).tolist() for step in range(3)]
    assert drawn == [[0, 0, 0, 1]] * 3


def test_ranks_divide_a_batch(dataset: Path) -> None:
    picks, symmetries = draw(snapshots(dataset), None, 6, seed=0, step=0)
    parts = [share((picks, symmetries), rank, 3) for rank in range(3)]
    assert [len(part) for part, _ in parts] == [2, 2, 2]
    pairs = [pair for part in parts for pair in zip(*part, strict=True)]
    assert sorted(pairs, key=str) == sorted(zip(picks, symmetries, strict=True), key=str)


def test_a_batch_larger_than_the_dataset_is_filled(dataset: Path) -> None:
    """A batch must have its full size so that ranks can divide it evenly."""
    picks, symmetries = draw(snapshots(dataset), None, 16, seed=0, step=0)
    assert len(picks) == len(symmetries) == 16
    assert set(picks) <= set(range(10))
