"""Routed experts compared with one expert at a time, for every form of input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shodh_moe.model.experts import Experts

DIM, HIDDEN, LOCAL = 4, 3, 3


def _experts() -> Experts:
    return Experts(DIM, HIDDEN, range(LOCAL), seed=0, layer=0).double()


def _expert(experts: Experts, index: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ experts.gate_up_LDF[index]).chunk(2, dim=1)
    return (F.silu(gate) * up) @ experts.down_LFD[index]


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _gradients(experts: Experts, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), (x, experts.gate_up_LDF, experts.down_LFD))


def _same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("counts", [[2, 3, 4], [0, 9, 0], [9, 0, 0], [0, 0, 0]])
def test_rows_sorted_by_expert(counts):
    experts, x = _experts(), _rows(sum(counts), DIM)
    y = experts.grouped(x, torch.tensor(counts))
    expected = torch.cat([_expert(experts, index, share) for index, share in enumerate(x.split(counts))])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    _same(_gradients(experts, x, y), _gradients(experts, x, expected))


def test_slots_of_every_expert():
    experts, x = _experts(), _rows(LOCAL, 5, DIM)
    y = experts(x)
    expected = torch.stack([_expert(experts, index, x[index]) for index in range(LOCAL)])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    _same(_gradients(experts, x, y), _gradients(experts, x, expected))


@pytest.mark.parametrize("filled", [[[4], [0], [6]], [[3, 2], [0, 1], [0, 0]], [[2, 2, 2], [1, 0, 1], [0, 1, 2]]])
def test_empty_slots_are_left_out_and_change_nothing(filled):
    """Blocks of slots from one, two and three ranks, of which the first few hold tokens and the others are zero."""
    experts, ranks = _experts(), len(filled[0])
    slot = torch.arange(6 // ranks)
    mask = (slot < torch.tensor(filled)[:, :, None]).view(LOCAL, 6, 1)
    x = (_rows(LOCAL, 6, DIM).detach() * mask).requires_grad_()
    y, plain = experts(x, torch.tensor(filled)), experts(x)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-14)
    assert not y[~mask.expand_as(y)].any()
    # An empty slot's gradient is not used: dispatch assigns the slot to no token.
    (dx, *dweights), (plain_dx, *plain_dweights) = _gradients(experts, x, y), _gradients(experts, x, plain)
    _same((dx, *dweights), (plain_dx * mask, *plain_dweights))


def test_empty_slots_are_really_left_out():
    experts, x = _experts(), _rows(LOCAL, 2, DIM).detach()
    x[1] = torch.nan
    assert not experts(x, torch.tensor([[2], [0], [2]])).isnan().any()


def test_gradients_against_finite_differences():
    experts, x = _experts(), _rows(7, DIM)
    names = [name for name, _ in experts.named_parameters()]

    def product(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        class Call(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = experts

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.experts.grouped(x, torch.tensor([4, 0, 3]))

        parameters = {f"experts.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Call(), parameters, (x,))

    assert torch.autograd.gradcheck(product, (x, *experts.parameters()))


@pytest.mark.parametrize("form", ["slots", "rows"])
def test_autocast_gives_bfloat16_products_and_float32_gradients(form):
    experts = _experts().float()
    x = _rows(LOCAL, 4, DIM).detach().float().requires_grad_()

    def call() -> torch.Tensor:
        return experts(x) if form == "slots" else experts.grouped(x.flatten(0, 1), torch.full((LOCAL,), 4))

    wide = call()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = call()
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.02)
    for one, other in zip(_gradients(experts, x, narrow.float()), _gradients(experts, x, wide), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


def test_an_expert_starts_equal_on_any_rank():
    every, second_half = Experts(DIM, HIDDEN, range(4), 0, 1), Experts(DIM, HIDDEN, range(2, 4), 0, 1)
    assert torch.equal(every.gate_up_LDF[2:], second_half.gate_up_LDF)
    assert not torch.equal(every.down_LFD[0], every.down_LFD[1])
