"""Free-running prediction with an operator, its error, and the loss that trains it through several steps.

Shapes: B batch, T frames, C channels, H W grid. Everything in the units in which the network was trained.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """`FNO2d`, `DPOT2d`, or an engine around one."""

    history: int

    def __call__(self, history_BTCHW: Tensor, condition: Tensor | None = None, /) -> Tensor: ...


def rollout(model: Operator, frames_BTCHW: Tensor, steps: int, condition: Tensor | None = None) -> Tensor:
    """The ``steps`` frames after the last of ``frames_BTCHW``, [B, steps, C, H, W]; predictions are fed back.

    The last ``model.history`` frames are used. Gradients flow through all steps unless the caller turns them off.

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
    """sqrt(mean error^2) / sqrt(mean true^2) over channels and cells: [..., C, H, W] twice to [...].

    PDEBench's normalised RMSE (arXiv 2210.07182, `metric_func`) with one difference: there each channel is divided by
    its own norm before the mean over channels, so one that is near zero (a velocity at rest) outweighs all others.
    For PDEBench's own number give each channel as a field of its own, [..., C, 1, H, W], and take the mean.
    The gradient where the error is zero is zero. A true field that is zero everywhere gives infinity, or NaN.
    """
    over = (-3, -2, -1)
    return torch.linalg.vector_norm(predicted - true, dim=over) / torch.linalg.vector_norm(true, dim=over)


def rollout_loss(model: Operator, frames_BTCHW: Tensor, steps: int, condition: Tensor | None = None) -> Tensor:
    """Mean `nrmse` over the batch and over ``steps`` frames predicted one from the other; a scalar.

    The first ``model.history`` frames are given, the next ``steps`` are the truth, frames after those are not used.

    Raises:
        ValueError: fewer frames than ``model.history + steps``.
    """
    history = model.history
    if frames_BTCHW.shape[1] < history + steps:
        raise ValueError(f"{history} + {steps} frames are needed; {frames_BTCHW.shape[1]} were given")
    predicted = rollout(model, frames_BTCHW[:, :history], steps, condition)
    return nrmse(predicted, frames_BTCHW[:, history : history + steps]).mean()
