"""Rollouts, their error, and the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shodh_moe.operators import FNO2d, FNOSize, nrmse, rollout, rollout_loss


class Fibonacci:
    """The next frame is the sum of the last two, times the condition."""

    history = 2

    def __call__(self, history_BTCHW: Tensor, condition: Tensor | None = None) -> Tensor:
        scale = 1 if condition is None else condition.view(-1, 1, 1, 1)
        return history_BTCHW.sum(1) * scale


def constant(*values: float) -> Tensor:
    """Return frames [1, T, 1, 2, 2] with these values."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1).expand(-1, -1, -1, 2, 2)


def test_predictions_are_fed_back() -> None:
    frames = rollout(Fibonacci(), constant(9, 1, 1), 5)
    assert frames[0, :, 0, 0, 0].tolist() == [2, 3, 5, 8, 13]
    frames = rollout(Fibonacci(), constant(1, 1), 3, torch.tensor([2.0]))
    assert frames[0, :, 0, 1, 1].tolist() == [4, 10, 28]


def test_the_loss_is_the_mean_error_of_the_unrolled_steps() -> None:
    loss = rollout_loss(Fibonacci(), constant(1, 1, 2, 4, 99), 2)
    assert loss.item() == pytest.approx((0 + 0.25) / 2)  # 2 for 2, 3 for 4; the last frame is not used
    with pytest.raises(ValueError, match=r"2 \+ 4 frames are needed; 5"):
        rollout_loss(Fibonacci(), constant(1, 1, 2, 4, 99), 4)
    with pytest.raises(ValueError, match="needs 2 frames"):
        rollout(Fibonacci(), constant(1), 4)


def test_nrmse() -> None:
    true = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert nrmse(true, true).shape == (4, 3)
    torch.testing.assert_close(nrmse(torch.zeros_like(true), true), torch.ones(4, 3))
    torch.testing.assert_close(nrmse(1.1 * true, true), torch.full((4, 3), 0.1))
    pdebench = ((1.1 * true - true).square().mean((-1, -2)).sqrt() / true.square().mean((-1, -2)).sqrt()).mean()
    torch.testing.assert_close(nrmse((1.1 * true)[:, :, :, None], true[:, :, :, None]).mean(), pdebench)


def test_a_zero_error_has_a_zero_gradient() -> None:
    true = torch.ones(1, 1, 4, 4)
    predicted = true.clone().requires_grad_()
    nrmse(predicted, true).sum().backward()
    assert predicted.grad.abs().sum() == 0


def test_the_loss_trains_through_several_steps() -> None:
    """The model learns a wave that moves one cell per frame from rollouts of three steps."""
    wave = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([wave.roll(shift, -1) for shift in range(4)], dim=1)
    model = FNO2d(FNOSize(width=8, modes=4, blocks=2), 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = rollout_loss(model, frames, 3).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = rollout_loss(model, frames, 3)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    # Every step counts: the first alone would not show this error.
    worse = frames.clone()
    worse[:, 3] = 0.5
    assert rollout_loss(model, worse, 3) > rollout_loss(model, frames, 3)
