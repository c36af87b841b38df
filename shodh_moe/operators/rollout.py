"""Autoregressive prediction with an operator, its error, and the loss that trains it through several steps.

Shapes: B batch, T frames, C channels, H W grid. All fields are in the units in which the network was trained.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """An `FNO2d` or `DPOT2d`, or a training engine that wraps one."""

    history: int

    def __call__(self, history_BTCHW: Tensor, condition: Tensor | None = None, /) -> Tensor: ...


def rollout(model: Operator, frames_BTCHW: Tensor, steps: int, condition: Tensor | None = None) -> Tensor:
    """Predict the ``steps`` frames after ``frames_BTCHW``, feeding predictions back: [B, steps, C, H, W].

    Only the last ``model.history`` frames are used. Gradients flow through all steps unless the caller disables them.

    Raises:
        ValueError: fewer frames than the network's history.
    """
    history = model.history
    if frames_BTCHW.shape[1] < history:
        raise ValueError(f"the network needs {history} frames to start from; {frames_BTCHW.shape[1]} were given")
    frames = list(frames_BTCHW[:, -history:].unbind(1))
    for _ in range(steps):
        frames.append(model(torch.stack(frames[-history:], dim=1), condition))
    return torch.stack(frames[history:], dim=1)


def nrmse(predicted: Tensor, true: Tensor) -> Tensor:
    """Normalised RMSE, sqrt(mean error^2) / sqrt(mean true^2) over channels and cells: [..., C, H, W] to [...].

    It is that of PDEBench (arXiv 2210.07182, `metric_func`) with one difference: PDEBench divides each channel by its
    own norm before the mean over channels, so a channel near zero (a velocity at rest) outweighs all others. For
    PDEBench's own number, pass each channel as a separate field, [..., C, 1, H, W], and take the mean. Where the error
    is zero, so is the gradient. A true field that is zero everywhere gives infinity, or NaN if the error is zero too.
    """
    over = (-3, -2, -1)
    return torch.linalg.vector_norm(predicted - true, dim=over) / torch.linalg.vector_norm(true, dim=over)


def rollout_loss(model: Operator, frames_BTCHW: Tensor, steps: int, condition: Tensor | None = None) -> Tensor:
    """Mean `nrmse` over the batch and over a `rollout` of ``steps`` frames; a scalar.

    The first ``model.history`` frames are the input, the next ``steps`` the truth; later frames are not used.

    Raises:
        ValueError: fewer frames than ``model.history + steps``.
    """
    history = model.history
    if frames_BTCHW.shape[1] < history + steps:
        raise ValueError(f"{history} + {steps} frames are needed; {frames_BTCHW.shape[1]} were given")
    predicted = rollout(model, frames_BTCHW[:, :history], steps, condition)
    return nrmse(predicted, frames_BTCHW[:, history : history + steps]).mean()
