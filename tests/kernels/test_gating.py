"""Top-1 gating: choice, slots, drops and losses, against plain loops and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.kernels import expert_capacity, top1_gating


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "minimum", "expected"),
    [
        (50, 4, 1.2, 1, 15),  # float32 arithmetic gives 16 (DeepSpeed 0.19.8)
        (10, 4, 1.0, 1, 3),
        (8, 4, 1.0, 4, 4),
        (1, 2, 1.25, 1, 1),
        (2**20, 3, 1.0, 1, 349526),
    ],
)
def test_capacity_is_exact(tokens, experts, factor, minimum, expected):
    assert expert_capacity(tokens, experts, factor, minimum) == expected


def _by_loop(logits: torch.Tensor, capacity: int, order: str) -> tuple[list[int], list[int]]:
    """Expert and slot of each token, one token at a time."""
    p = torch.log_softmax(logits, dim=1).exp().tolist()  # ties must round alike
    expert = [row.index(max(row)) for row in p]
    tokens = range(len(p))
    queue = tokens if order == "position" else sorted(tokens, key=lambda n: -p[n][expert[n]])
    kept, used = set(), [0] * logits.shape[1]
    for n in queue:
        if used[expert[n]] < capacity:
            used[expert[n]] += 1
            kept.add(n)
    slot, filled = [], [0] * logits.shape[1]
    for n in tokens:
        slot.append(filled[expert[n]] if n in kept else -1)
        filled[expert[n]] += n in kept
    return expert, slot


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    experts=st.integers(2, 9),
    capacity=st.integers(1, 40),
    order=st.sampled_from(["position", "probability"]),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_slots_equal_those_of_a_loop(tokens, experts, capacity, order, ties, seed):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        logits = logits.round()
    g = top1_gating(logits, capacity, order)
    expert, slot = _by_loop(logits, capacity, order)
    assert g.expert_N.tolist() == expert
    assert g.slot_N.tolist() == slot
    assert g.routed_E.sum() == tokens
    assert g.kept_E.tolist() == [min(capacity, int(count)) for count in g.routed_E]


def test_all_tied_goes_to_the_lowest_expert():
    g = top1_gating(torch.zeros(5, 4), 3)
    assert g.expert_N.tolist() == [0] * 5
    assert g.slot_N.tolist() == [0, 1, 2, -1, -1]


def test_probability_order_keeps_the_most_probable():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert top1_gating(logits, 2, "probability").slot_N.tolist() == [-1, 0, 1]
    assert top1_gating(logits, 2, "position").slot_N.tolist() == [0, 1, -1]


def test_bias_moves_the_choice_but_not_the_gate():
    logits = torch.tensor([[1.0, 0.9]])
    g = top1_gating(logits, 1, bias_E=torch.tensor([0.0, 1.0]))
    assert g.expert_N.item() == 1
    assert g.gate_N.item() == pytest.approx(torch.softmax(logits, 1)[0, 1].item())


def test_losses_at_their_known_values():
    """Uniform probabilities and perfect balance: balance loss 1, z-loss ln(E)^2."""
    g = top1_gating(torch.zeros(8, 4), 8)
    assert g.balance_loss.item() == pytest.approx(1.0)
    assert g.z_loss.item() == pytest.approx(math.log(4) ** 2)
    one_sided = top1_gating(torch.tensor([[50.0, 0.0]] * 6), 6)
    assert one_sided.balance_loss.item() == pytest.approx(2.0)


def test_gate_carries_the_gradient_of_its_softmax():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    top1_gating(logits, 6).gate_N.sum().backward()
    p = torch.softmax(logits.detach(), 1)
    best = p.max(1).values[:, None]
    one_hot = torch.nn.functional.one_hot(p.argmax(1), 3)
    torch.testing.assert_close(logits.grad, best * (one_hot - p))


def test_losses_pass_gradcheck():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(top1_gating(x, 5)[i] for i in (1, 6, 7)), (logits,))


def test_extreme_logits_stay_finite_and_nan_raises():
    g = top1_gating(torch.tensor([[1e30, -1e30], [0.0, -math.inf]]), 2)
    assert g.expert_N.tolist() == [0, 0]
    assert g.gate_N.tolist() == [1.0, 1.0]
    assert g.entropy_N.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="token 1 are NaN"):
        top1_gating(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), 2)


def test_unknown_drop_order_raises():
    with pytest.raises(ValueError, match="drop_order"):
        top1_gating(torch.zeros(1, 2), 1, "random")
