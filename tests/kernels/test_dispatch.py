"""Dispatch and combine: a round trip, drops, gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.kernels import combine, dispatch, top1_gating


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**16))
def test_round_trip_returns_kept_tokens_scaled_and_zeros_for_dropped(tokens, experts, capacity, seed):
    torch.manual_seed(seed)
    x = torch.randn(tokens, 5)
    g = top1_gating(torch.randn(tokens, experts), capacity)
    slots = dispatch(x, g.expert_N, g.slot_N, experts, capacity)
    assert slots.shape == (experts, capacity, 5)
    filled = slots.abs().sum(-1) > 0
    assert filled.sum() == g.kept_E.sum()
    y = combine(slots, g.expert_N, g.slot_N, g.gate_N)
    kept = (g.slot_N >= 0)[:, None]
    torch.testing.assert_close(y, torch.where(kept, x * g.gate_N[:, None], 0.0))


def test_shared_output_reaches_dropped_tokens():
    x, shared = torch.ones(3, 2), torch.full((3, 2), 7.0)
    expert, slot = torch.tensor([0, 0, 1]), torch.tensor([0, -1, 0])
    y = combine(dispatch(x, expert, slot, 2, 1), expert, slot, torch.tensor([0.5, 0.9, 1.0]), shared)
    assert y.tolist() == [[7.5, 7.5], [7.0, 7.0], [8.0, 8.0]]


def test_gradients():
    torch.manual_seed(0)
    g = top1_gating(torch.randn(7, 3, dtype=torch.float64), 2)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    gate = g.gate_N.clone().requires_grad_()
    shared = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def function(x, gate, shared):
        return combine(dispatch(x, g.expert_N, g.slot_N, 3, 2).sin(), g.expert_N, g.slot_N, gate, shared)

    assert torch.autograd.gradcheck(function, (x, gate, shared))
