"""The experts that each rank holds. tests/training/test_engine.py runs the exchange itself on real ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shodh_moe.parallel import ExpertParallel, all_to_all


@given(st.integers(1, 8), st.integers(1, 5))
def test_ranks_hold_all_experts_in_order(size, per_rank):
    experts = size * per_rank
    held = [expert for rank in range(size) for expert in ExpertParallel(size, rank).local_experts(experts)]
    assert held == list(range(experts))


def test_one_rank_needs_no_group():
    x = torch.randn(1, 3)
    assert all_to_all(x, ExpertParallel()) is x
    counts = torch.tensor([3, 0, 2])
    assert torch.equal(ExpertParallel().exchange_counts(counts), counts[None])


def test_exchange_without_a_group_is_an_error_not_a_copy():
    with pytest.raises(RuntimeError, match="group is not set"):
        all_to_all(torch.randn(2, 3), ExpertParallel(size=2))
