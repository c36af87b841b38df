"""Dividing samples among ranks. tests/training/test_sample_exchange.py sends them between real ranks."""

from __future__ import annotations

import math
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from shodh_moe.parallel import ExpertParallel, SampleExchange
from shodh_moe.parallel.sample_exchange import Share, share_out


@st.composite
def _counts(draw) -> list[list[int]]:
    ranks = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks)
    return draw(st.lists(row, min_size=ranks, max_size=ranks))


@given(_counts(), st.sampled_from([1.0, 1.1, 1.25, 2.0, 100.0]))
def test_every_sample_is_computed_once_and_no_rank_has_too_many(count_GG, capacity):
    shares = share_out(count_GG, capacity)
    assert shares == sorted(shares)
    given_to: Counter[tuple[int, int]] = Counter()
    computed: Counter[int] = Counter()
    for home, holder, rank, count in shares:
        assert count > 0
        given_to[home, holder] += count
        computed[rank] += count
    assert all(given_to[home, holder] == count for home, row in enumerate(count_GG) for holder, count in enumerate(row))
    ranks, samples = len(count_GG), sum(map(sum, count_GG))
    assert max(computed.values(), default=0) <= math.ceil(capacity * samples / ranks + 1e-9)
    if capacity >= ranks:
        assert all(share.rank == share.holder for share in shares)


def test_a_rank_prefers_its_own_samples_and_what_is_over_stays_at_home():
    # Three of rank 0's samples and both of rank 1's have experts on rank 1, which has room for three of five.
    assert share_out([[0, 3], [0, 2]], 1.2) == [Share(0, 1, 0, 2), Share(0, 1, 1, 1), Share(1, 1, 1, 2)]


def test_what_finds_no_room_at_home_goes_elsewhere():
    # Ranks 0 and 1 want to exchange all their samples, and rank 2's two go to rank 0 first.
    shares = share_out([[0, 2, 0], [2, 0, 0], [2, 0, 0]], 1.0)
    computed = Counter()
    for share in shares:
        computed[share.rank] += share.samples
    assert computed == {0: 2, 1: 2, 2: 2}


def test_one_rank_keeps_its_samples_in_order():
    exchange = SampleExchange(ExpertParallel(), torch.zeros(3, dtype=torch.int64), 1.0)
    columns = [
        torch.randn(3, 2, 4, dtype=torch.float64),
        torch.arange(3),
        torch.tensor([[True, False]] * 3),
        torch.randn(3).bfloat16(),
    ]
    for sent, received in zip(columns, exchange.send(columns), strict=True):
        assert torch.equal(sent, received)
        assert sent.dtype == received.dtype
    assert torch.equal(exchange.send_back(columns[0]), columns[0])
    assert (exchange.held_G, exchange.computed_G, exchange.strangers) == ([3], [3], 0)
