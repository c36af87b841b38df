"""Baselines with tuned parameters, chosen on validation regimes only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shodh_moe.ccm.bench.config import FineTuning
from shodh_moe.ccm.curve import Curve
from shodh_moe.ccm.data import Trajectories
from shodh_moe.ccm.expert import Expert, from_anchor
from shodh_moe.ccm.readout import golden_section, rollout_errors
from shodh_moe.operators import rollout_loss

SCALES = (0.1, 0.25, 0.5, 0.75, 1.0)
DENSITIES = (0.1, 0.2, 0.5, 0.8)
ORACLE_REACH = 2.0  # largest |alpha| that the oracle tries


def mean_error(expert: Expert, regimes: list[Trajectories], frames: int) -> float:
    """Mean nRMSE over regimes of the frames after the first ``frames``, which are given; infinite if one blew up."""
    means = [rollout_errors(expert, one.fields, one.coordinate, frames).mean() for one in regimes]
    total = float(torch.stack(means).mean())
    return total if math.isfinite(total) else math.inf


def tune(
    candidates: Iterable[dict[str, Any]], make: Callable[[dict[str, Any]], Expert], regimes: list[Trajectories], k: int
) -> tuple[Expert, dict[str, Any]]:
    """Return the expert that the best settings make, and these with their ``validation_error``.

    The best settings have the smallest `mean_error` on ``regimes``, which must be validation regimes.
    """
    tried = [(mean_error(make(settings), regimes, k), settings) for settings in candidates]
    best = min(tried, key=lambda one: one[0])
    return make(best[1]), {**best[1], "validation_error": best[0]}


def task_vectors(
    method: str, anchor: Expert, ends: list[Expert], regimes: list[Trajectories], k: int
) -> tuple[Expert, dict[str, Any]]:
    """Merge both endpoint experts by task arithmetic, TIES or DARE, with the best coefficient and density."""
    densities: tuple[float, ...] = () if method == "task_arithmetic" else DENSITIES
    pairs = itertools.product(SCALES, densities) if densities else ((scale,) for scale in SCALES)
    candidates = [dict(zip(("lambda", "density"), pair, strict=False)) for pair in pairs]

    def make(settings: dict[str, Any]) -> Expert:
        return from_anchor(method, anchor, ends, {"weight": 1.0, **settings})

    return tune(candidates, make, regimes, k)


def fine_tune(anchor: Expert, regime: Trajectories, k: int, rate: float, settings: FineTuning) -> Expert:
    """Fine-tune the anchor on one-step predictions within the first ``k`` frames of a regime's trajectories."""
    history = anchor.config.network.history
    tuned = anchor.with_weights(anchor.weights())
    network = tuned.network.train()
    parameter = next(network.parameters())
    seen = tuned.scale.normalise(regime.fields[:, :k].to(parameter))
    windows = seen.unfold(1, history + 1, 1).movedim(-1, 2).flatten(0, 1)  # [windows, history + 1, C, H, W]
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        picks = torch.randint(len(windows), (settings.batch_size,), generator=generator)
        loss = rollout_loss(network, windows[picks.to(windows.device)], 1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()
    return tuned


def choose_rate(
    anchor: Expert, regimes: list[Trajectories], k: int, settings: FineTuning
) -> tuple[float, dict[str, float]]:
    """Choose the learning rate of `fine_tune` with the smallest mean error on the validation regimes.

    The anchor is fine-tuned on each regime separately. Returns the rate, and the error of each rate.
    """

    def error(rate: float) -> float:
        each = [mean_error(fine_tune(anchor, one, k, rate, settings), [one], k) for one in regimes]
        return sum(each) / len(each)

    errors = {rate: error(rate) for rate in settings.learning_rates}
    return min(errors, key=lambda rate: errors[rate]), {str(rate): value for rate, value in errors.items()}


def oracle(curve: Curve, regime: Trajectories, k: int, known: Iterable[float]) -> tuple[float, Tensor]:
    """Find the best alpha of a regime from its true frames. This bounds readouts; it is not a method.

    Searches by golden section further than CCM's reach, and tries the ``known`` alphas too. Returns alpha and its
    errors [N, T - k].
    """
    found: dict[float, Tensor] = {}

    def error(alpha: float) -> float:
        found[alpha] = rollout_errors(curve(alpha), regime.fields, regime.coordinate, k)
        value = float(found[alpha].mean())
        return value if math.isfinite(value) else math.inf

    golden_section(error, -ORACLE_REACH, ORACLE_REACH, steps=9)
    errors = {alpha: error(alpha) if alpha not in found else float(found[alpha].mean()) for alpha in [*found, *known]}
    best = min(errors, key=lambda alpha: errors[alpha] if math.isfinite(errors[alpha]) else math.inf)
    return best, found[best]
