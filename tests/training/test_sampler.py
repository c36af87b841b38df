"""The sampler is a pure function: mixed domains, epochs without repetition, independent of the ranks."""

from __future__ import annotations

import pytest

from shodh_moe.errors import UserError
from shodh_moe.training.sampler import DomainSampler


def test_each_batch_mixes_the_domains_equally():
    sampler = DomainSampler((10, 7), batch_size=6, seed=0, world_size=2)
    for step in range(5):
        for rank in range(2):
            domains = [domain for domain, _ in sampler.batch(step, rank)]
            assert domains.count(0) == domains.count(1) == 3


def test_an_epoch_visits_every_sample_once():
    sampler = DomainSampler((12, 12), batch_size=4, seed=3)
    seen = [index for step in range(6) for domain, index in sampler.batch(step, 0) if domain == 0]
    assert sorted(seen) == list(range(12))
    again = [index for step in range(6, 12) for domain, index in sampler.batch(step, 0) if domain == 0]
    assert sorted(again) == list(range(12))
    assert again != seen


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    one = DomainSampler((30, 20), batch_size=8, seed=1)
    two = DomainSampler((30, 20), batch_size=4, seed=1, world_size=2)
    for step in range(6):
        assert sorted(one.batch(step, 0)) == sorted(two.batch(step, 0) + two.batch(step, 1))


def test_seed_changes_the_order():
    assert DomainSampler((50,), 10, seed=0).batch(0, 0) != DomainSampler((50,), 10, seed=1).batch(0, 0)


def test_batch_that_cannot_be_mixed_is_refused():
    with pytest.raises(UserError, match=r"batch_size 5 is not divisible by the 2 domains"):
        DomainSampler((10, 10), batch_size=5, seed=0)
