"""The sampler is a pure function that mixes domains, never repeats within an epoch and ignores the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.base.errors import UserError
from shodh_moe.data.sampler import DomainSampler, domain_weights, shares


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


def test_a_domain_keeps_its_order_when_others_are_left_out():
    joint = DomainSampler((20, 30, 25), batch_size=6, seed=4)
    alone = DomainSampler((25,), batch_size=2, seed=4, streams=(2,))
    for step in range(20):
        assert [index for domain, index in joint.batch(step, 0) if domain == 2] == [i for _, i in alone.batch(step, 0)]


def test_seed_changes_the_order():
    assert DomainSampler((50,), 10, seed=0).batch(0, 0) != DomainSampler((50,), 10, seed=1).batch(0, 0)


def test_a_batch_that_the_domains_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"batch_size 5 is not divisible by the 2 domains"):
        DomainSampler((10, 10), batch_size=5, seed=0)


@pytest.mark.parametrize(
    ("batch_size", "weights", "expected"),
    [
        (6, (1, 1), (3, 3)),
        (8, (2, 1, 1), (4, 2, 2)),
        (8, (1, 1, 1), (3, 3, 2)),
        (10, (0.55, 0.45), (6, 4)),
        (4, (100, 1), (3, 1)),
        (5, (1000, 1, 1, 1), (2, 1, 1, 1)),
        (4, (3, 0, 1), (3, 0, 1)),
        (3, (1e308, 1e308, 1e308), (1, 1, 1)),
        (7, (1e-300, 6e-300), (1, 6)),
    ],
)
def test_weights_divide_the_micro_batch(batch_size: int, weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert shares(batch_size, weights) == expected
    sampler = DomainSampler((10,) * len(weights), batch_size, seed=0, world_size=2, weights=weights)
    for step in range(3):
        drawn = [domain for domain, _ in sampler.batch(step, 1)]
        assert tuple(drawn.count(domain) for domain in range(len(weights))) == expected


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e300), min_size=1, max_size=6).filter(any),
    spare=st.integers(0, 20),
)
def test_shares_are_integers_near_the_weights_and_leave_no_domain_out(weights: list[float], spare: int) -> None:
    used = sum(weight > 0 for weight in weights)
    batch_size = used + spare
    counts = shares(batch_size, weights)
    assert sum(counts) == batch_size
    assert [count > 0 for count in counts] == [weight > 0 for weight in weights]
    for count, weight in zip(counts, weights, strict=True):
        exact = batch_size * (weight / max(weights)) / sum(w / max(weights) for w in weights)
        # Domains raised to one sample take it from the others.
        assert exact - used - 1e-6 <= count <= max(exact + 1, 1)


def test_equal_weights_draw_the_same_as_no_weights() -> None:
    plain, weighted = (DomainSampler((10, 7), 6, 0, 2, weights) for weights in (None, (0.5, 0.5)))
    for step in range(10):
        assert plain.batch(step, 1) == weighted.batch(step, 1)


def test_unequal_shares_still_visit_every_sample_once_an_epoch() -> None:
    sampler = DomainSampler((12, 5), batch_size=4, seed=3, weights=(3, 1))
    seen = [sample for step in range(4) for sample in sampler.batch(step, 0)]
    assert sorted(index for domain, index in seen if domain == 0) == list(range(12))
    assert len({index for domain, index in seen if domain == 1}) == 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, -1), "numbers >= 0"),
        ((0, 0), "at least one of them > 0"),
        ((1, float("nan")), "numbers >= 0"),
        ((float("inf"), 1), "numbers >= 0"),
        ((1, 1, 1), "batch_size 2 is less than the 3 domains"),
    ],
)
def test_impossible_weights_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DomainSampler((9,) * len(weights), batch_size=2, seed=0, weights=weights)


def test_weights_are_given_by_name() -> None:
    assert domain_weights({"b": 2}, ["a", "b"]) == (1.0, 2.0)
    assert domain_weights(None, ["a"]) is None
    with pytest.raises(UserError, match=r"data\.weights\.c: the dataset has only a, b"):
        domain_weights({"c": 1}, ["a", "b"])
