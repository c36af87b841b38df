"""The line between two experts: where a regime lies on it (readouts, DESIGN 3.7), and how far it is straight.

coordinate   alpha = clip(s)             s is the regime's known coordinate
scale        alpha = clip(gamma s)       gamma is chosen once, on validation regimes
prefix       the alpha that best predicts the regime's first K frames: the best of a bank, refined by golden section

CCM extrapolates along a line in weight space. Predictions follow a line too only as far as the network is linear in its
weights along it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.data import Trajectories
from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.merging.alpha import REACH
from shodh_moe.operators import nrmse

BANK = tuple(step / 4 for step in range(-6, 7))  # alphas that the prefix tries: -1.5, -1.25, ..., 1.5
FRAMES = 4  # K
FLAT = 0.05  # an optimum is flat if the relative rise of the error one step of the bank away is smaller
GAMMAS = tuple(step / 10 for step in range(4, 17))  # 0.4, 0.5, ..., 1.6
BEND_ALPHAS = (0.0, 0.5, 1.25, 1.5, 1.75, 2.0)  # |alpha| at which the bend is measured, with both signs
BEND_TOLERANCE = 0.25
PROBES = 8  # trajectories per regime for measuring the bend
_GOLDEN = (5**0.5 - 1) / 2


def clip(alpha: float, reach: float = REACH) -> float:
    """Clip ``alpha`` to +-``reach``."""
    return min(max(alpha, -reach), reach)


def rollout_errors(expert: Expert, fields_NTCHW: Tensor, coordinate: float, given: int, batch: int = 16) -> Tensor:
    """nRMSE [N, T - given], on the CPU, of the frames after the first ``given`` ones, predicted from only those.

    Computed in physical units, on the network's device and in its dtype, ``batch`` trajectories at a time.
    """
    parameter = next(expert.network.parameters())
    found = []
    for fields in fields_NTCHW.split(batch):
        fields = fields.to(parameter)
        predicted = expert.predict(fields[:, :given], fields.shape[1] - given, coordinate)
        found.append(nrmse(predicted, fields[:, given:]).cpu())
    return torch.cat(found)


def fit_scale(low: Expert, high: Expert, validation: list[Trajectories], given: int = FRAMES) -> dict[str, Any]:
    """Find the gamma with the smallest mean error over all validation regimes; among equals, the one nearest to 1.

    Returns:
        ``{"gamma": ..., "errors": {gamma: error}}``.
    """
    cache: dict[tuple[int, float], float] = {}

    def error(gamma: float) -> float:
        total = 0.0
        for number, regime in enumerate(validation):
            alpha = round(clip(gamma * regime.coordinate), 6)
            if (number, alpha) not in cache:
                errors = rollout_errors(compose(low, high, alpha), regime.fields, regime.coordinate, given)
                cache[number, alpha] = finite_error(errors.mean())
            total += cache[number, alpha]
        return total / len(validation)

    errors = {gamma: error(gamma) for gamma in GAMMAS}
    gamma = min(errors, key=lambda one: (errors[one], abs(one - 1)))
    return {"gamma": gamma, "errors": {str(key): value for key, value in errors.items()}}


@dataclass(frozen=True)
class Prefix:
    """The readout of a regime's first frames.

    Attributes:
        alpha: the best alpha.
        error: its nRMSE on the frames; infinite if no alpha has a finite error.
        sharpness: relative rise of the error one step of the bank (0.25) away, on the side where it is smaller; below
            `FLAT` the frames hardly distinguish one alpha from another.
        bank: error by alpha, as ``{"+0.25": error}``.
        frames: K.
    """

    alpha: float
    error: float
    sharpness: float
    bank: dict[str, float]
    frames: int

    @property
    def flat(self) -> bool:
        return self.sharpness < FLAT

    def record(self) -> dict[str, Any]:
        return asdict(self)


def fit_prefix(low: Expert, high: Expert, fields_NTCHW: Tensor, frames: int = FRAMES) -> Prefix:
    """`fit_prefix_on` the line between two experts."""
    return fit_prefix_on(lambda alpha: compose(low, high, alpha), low.config.network.history, fields_NTCHW, frames)


def fit_prefix_on(curve: Callable[[float], Expert], history: int, fields_NTCHW: Tensor, frames: int = FRAMES) -> Prefix:
    """Find the alpha that best predicts frames ``history`` to ``frames`` - 1 of the trajectories from the earlier ones.

    Args:
        curve: the expert at each alpha.
        history: number of frames that the network sees.
        fields_NTCHW: trajectories of one regime; only their first ``frames`` frames are used.

    Raises:
        UserError: there are fewer frames, or too few for the network's history.
    """
    if fields_NTCHW.shape[1] < frames:
        raise UserError(f"the prefix has {fields_NTCHW.shape[1]} frames, but {frames} are needed: give a longer prefix")
    if frames <= history:
        raise UserError(
            f"a prefix of {frames} frames leaves none to predict after the {history} that the network sees: "
            "give more frames"
        )
    seen = fields_NTCHW[:, :frames]

    def error(alpha: float) -> float:
        # The coordinate is unknown here; only a conditioned network would use it, and that needs no prefix.
        return finite_error(rollout_errors(curve(alpha), seen, 0.0, history).mean())

    bank = {alpha: error(alpha) for alpha in BANK}
    best = min(bank, key=lambda alpha: bank[alpha])
    step = BANK[1] - BANK[0]
    alpha, smallest = golden_section(error, max(best - step, BANK[0]), min(best + step, BANK[-1]))
    if bank[best] <= smallest:
        alpha, smallest = best, bank[best]
    # Look beyond the end of the bank too: an optimum there is not flat just because one side is missing.
    nearby = min(error(alpha - step), error(alpha + step))
    sharpness = math.inf if smallest == 0 else nearby / smallest - 1 if math.isfinite(smallest) else 0.0
    return Prefix(alpha, smallest, sharpness, {f"{key:+.2f}": value for key, value in bank.items()}, frames)


def golden_section(error: Callable[[float], float], low: float, high: float, steps: int = 7) -> tuple[float, float]:
    """Minimise a function with one minimum in [low, high]; return the best point and its value.

    Kiefer 1953: each step evaluates one point and leaves 61.8 % of the interval. `scipy.optimize.golden` does not
    replace it: it first searches for a bracket, which may leave [low, high] and fails where the function is infinite.
    """
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = error(a), error(b)
    for _ in range(steps):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = error(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = error(b)
    return (a, at_a) if at_a <= at_b else (b, at_b)


def finite_error(error: Tensor) -> float:
    """Replace NaN by infinity: a rollout that blew up counts as worse than any other."""
    value = float(error)
    return value if torch.isfinite(error) else float("inf")


def json_number(value: float, digits: int = 6) -> float | None:
    """Round to ``digits`` significant digits for JSON; None for infinity and NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def probes(regimes: list[Trajectories], history: int, trajectories: int = PROBES) -> Tensor:
    """Frames from the beginning and the middle of some trajectories of each regime, [N, history, C, H, W]."""
    return torch.cat(
        [r.fields[:trajectories, t : t + history] for r in regimes for t in (0, (r.fields.shape[1] - history) // 2)]
    )


def bend(low: Expert, high: Expert, frames_NTCHW: Tensor) -> dict[float, float]:
    """Distance of one-step predictions from the straight line between those of the experts, by alpha.

    With g(alpha) the prediction of the expert composed at alpha, and l the line through g(-1) and g(1), the bend is
    |g(alpha) - l(alpha)| / (|g(1) - g(-1)| / 2): 0 on the line, 1 at the distance of an expert from the middle of the
    line. Norms are over all frames.

    Args:
        frames_NTCHW: inputs of the network, T = ``history`` frames each, of one or more regimes, in physical units.
    """

    def predicted(alpha: float) -> Tensor:
        expert = compose(low, high, alpha)
        return expert.scale.normalise(expert.predict(frames_NTCHW.to(next(expert.network.parameters())), 1, 0.0))

    at_low, at_high = predicted(-1.0), predicted(1.0)
    half = torch.linalg.vector_norm(at_high - at_low) / 2
    found = {}
    for alpha in sorted({sign * size + 0.0 for size in BEND_ALPHAS for sign in (-1.0, 1.0)}):
        line = (1 - alpha) / 2 * at_low + (1 + alpha) / 2 * at_high
        found[alpha] = float(torch.linalg.vector_norm(predicted(alpha) - line) / half)
    return found


def straight_to(bends: dict[float, float]) -> float:
    """The largest |alpha| in ``bends`` up to which no bend on either side exceeds `BEND_TOLERANCE`; at least 1."""
    reached = 1.0
    for size in sorted({abs(alpha) for alpha in bends}):
        if any(not value <= BEND_TOLERANCE for alpha, value in bends.items() if abs(alpha) == size):
            break
        reached = max(reached, size)
    return reached
