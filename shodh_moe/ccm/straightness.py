"""How far the path between two experts is straight, seen in what the networks predict.

CCM extrapolates along a line of weights. Predictions follow such a line only as far as the network is linear in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shodh_moe.ccm.compose import compose
from shodh_moe.ccm.data import Trajectories
from shodh_moe.ccm.expert import Expert

ALPHAS = (0.0, 0.5, 1.25, 1.5, 1.75, 2.0)  # asked for on both sides
TOLERANCE = 0.25
PROBES = 8  # trajectories of each regime


def probes(regimes: list[Trajectories], history: int) -> Tensor:
    """From the beginning and the middle of some trajectories of each regime, [N, history, C, H, W]."""
    return torch.cat(
        [r.fields[:PROBES, t : t + history] for r in regimes for t in (0, (r.fields.shape[1] - history) // 2)]
    )


def bend(low: Expert, high: Expert, frames_NTCHW: Tensor) -> dict[float, float]:
    """How far one step from the frames leaves the straight line, by alpha.

    With g(alpha) the prediction of the expert at alpha, |g(alpha) - l(alpha)| / (|g(1) - g(-1)| / 2), l the line
    through g(-1) and g(1). 0: on the line; 1: off it by as much as an expert is away from the middle. Norms are over
    all frames.

    Args:
        frames_NTCHW: the network's ``history`` frames of several states of one or more regimes, physical units.
    """

    def predicted(alpha: float) -> Tensor:
        expert = compose(low, high, alpha)
        return expert.scale.normalise(expert.predict(frames_NTCHW.to(next(expert.network.parameters())), 1, 0.0))

    at_low, at_high = predicted(-1.0), predicted(1.0)
    half = torch.linalg.vector_norm(at_high - at_low) / 2
    found = {}
    for alpha in sorted({sign * size + 0.0 for size in ALPHAS for sign in (-1.0, 1.0)}):
        line = (1 - alpha) / 2 * at_low + (1 + alpha) / 2 * at_high
        found[alpha] = float(torch.linalg.vector_norm(predicted(alpha) - line) / half)
    return found


def straight_to(bends: dict[float, float]) -> float:
    """The largest |alpha| of `bend` up to which no side leaves the line by more than `TOLERANCE`; at least 1."""
    reached = 1.0
    for size in sorted({abs(alpha) for alpha in bends}):
        if any(not value <= TOLERANCE for alpha, value in bends.items() if abs(alpha) == size):
            break
        reached = max(reached, size)
    return reached
