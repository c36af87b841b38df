"""Placement of experts on ranks by their load. tests/training/test_placement.py moves them during a training."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shodh_moe.base.parameters import mark
from shodh_moe.checkpoint import runs
from shodh_moe.parallel import ExpertParallel, place_experts


def _busiest(load_E: list[float], ranks: int, order: list[int]) -> float:
    each = len(load_E) // ranks
    return max(sum(load_E[expert] for expert in order[rank * each :][:each]) for rank in range(ranks))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_new_placement_is_a_better_one(ranks, each, data):
    load_E = data.draw(st.lists(st.integers(0, 100), min_size=ranks * each, max_size=ranks * each))
    present = data.draw(st.permutations(range(ranks * each)))
    placement = place_experts(load_E, ranks, present)
    if placement is not None:
        assert sorted(placement) == sorted(present)
        assert _busiest(load_E, ranks, placement) < _busiest(load_E, ranks, present)
        assert place_experts(load_E, ranks, placement) is None


def test_busy_experts_go_to_different_ranks():
    assert place_experts([5, 4, 1, 0], 2) == [0, 3, 1, 2]
    assert place_experts([0, 0, 0, 0], 2) is None
    assert place_experts([3, 1], 2) is None  # one expert each: no placement is better
    assert place_experts([51, 49, 50, 50], 2) is None


def test_the_number_of_experts_of_a_rank_is_fixed():
    assert place_experts([9, 1, 1, 1, 1, 1], 2) is None  # the busy expert cannot have fewer than two beside it
    assert place_experts([9, 8, 1, 1, 1, 1], 2) == [0, 3, 5, 1, 2, 4]


@pytest.mark.parametrize("placement", [None, [0, 3, 5, 1, 2, 4]])
def test_ranks_hold_what_the_placement_says(placement):
    ranks = [ExpertParallel(2, rank, placement=placement) for rank in range(2)]
    order = placement or list(range(6))
    assert [expert for ep in ranks for expert in ep.local_experts(6)] == order
    for rank, ep in enumerate(ranks):
        holder_E = ep.holders(6, torch.device("cpu"))
        assert all(holder_E[expert] == rank for expert in ep.local_experts(6))


@pytest.mark.parametrize("placement", [None, [1, 4, 0, 5, 2, 3]])
def test_parts_of_a_parameter_find_their_place_in_the_logical_tensor(placement):
    """Any part of what a rank holds is found in the tensor of all experts, in as few runs as possible."""
    logical = torch.arange(6 * 4)
    for rank in range(3):
        ep = ExpertParallel(3, rank, placement=placement)
        local = logical.view(6, 4)[ep.local_experts(6)]
        sharded = local.clone()
        mark(sharded, sharded=True)
        for start, end in itertools.combinations(range(9), 2):
            found = runs(sharded, ep, start, end - start)
            parts = [logical[begin : begin + count] for begin, _, count in found]
            assert torch.equal(torch.cat(parts), local.view(-1)[start:end])
            assert [first for _, first, _ in found] == [0, *itertools.accumulate(map(len, parts))][:-1]
            consecutive = placement is None or rank == 2
            assert len(found) == (1 if consecutive or end <= 4 or start >= 4 else 2)
    assert runs(local, ExpertParallel(3, 1), 2, 5) == [(2, 0, 5)]  # not sharded
