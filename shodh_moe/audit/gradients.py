"""Gradient conflict: whether domains pull the same weights in opposite directions (DESIGN 3.6).

Two gradients conflict if their cosine is below 0, as in PCGrad (Yu et al., arXiv 2001.06782, section 2). PCGrad's
magnitude similarity is 2 r / (1 + r^2), where r is the ratio of norms reported here.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.audit.windows import all_windows
from shodh_moe.base.parameters import marks
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config import Config
from shodh_moe.inference.loading import find_source, read_weights
from shodh_moe.metrics.latents import sample_mse
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples

Windows = list[tuple[int, int]]


def gradients_over_training(run: Path, config: Config, samples: LatentSamples, per_domain: int) -> list[dict[str, Any]]:
    """`gradient_conflict` at every checkpoint of a run: ``[{"step", "groups"}]`` by ascending step; [] without any.

    Raises:
        UserError: a checkpoint is damaged.
    """
    channels = samples.trajectories[0].z.shape[1]
    transformer = LatentTransformer(config.model, channels, config.seed, ExpertParallel())
    records = []
    for step in list_checkpoints(run / "checkpoints"):
        transformer.load_state_dict(read_weights(find_source(run / "checkpoints" / str(step))))
        groups = gradient_conflict(transformer, samples, per_domain, config.evaluation.batch_size)
        records.append({"step": step, "groups": groups})
    return records


def gradient_conflict(
    transformer: LatentTransformer, samples: LatentSamples, per_domain: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Compare the domains' gradients of the mean squared prediction error; the router's losses are left out.

    A domain's gradient is the mean over ``per_domain`` of its samples (all, if it has fewer), evenly spread and the
    same in every call. No token is dropped. The model's mode and ``.grad`` do not change.

    Args:
        transformer: the model, with all experts in this process.
        batch_size: number of samples at a time; it affects the result only by rounding.

    Returns:
        by group of parameters (the ``group`` of their `Marks`, and for each expert a group of its own):
        ``cosine`` ``{"a|b": float}`` for every pair of domains, in [-1, 1];
        ``ratio`` ``{"a|b": float}``, the norm of a's gradient over that of b's;
        ``within`` ``{domain: float}``, the cosine between the gradients of the first and the second half of the
        domain's samples, which come from different trajectories if there are several. It separates noise from
        conflict: two domains whose gradients differ only by noise have a cosine of about ``sqrt(q_a q_b)``, where
        q = 2 w / (1 + w) and w is ``within`` (Spearman and Brown: reliability of the whole from its halves).
        A value is None if a gradient is zero, such as that of an expert without tokens.
    """
    windows: list[Windows] = [[] for _ in samples.domains]
    for window in all_windows(samples, per_domain):
        windows[window[0]].append(window)
    training = transformer.training
    transformer.eval()  # training mode drops tokens whose expert is full
    try:
        halves = {
            domain: [
                _gradient(transformer, samples, half, batch_size)
                for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :])
            ]
            for domain, chosen in zip(samples.domains, windows, strict=True)
        }
    finally:
        transformer.train(training)
    groups: dict[str, dict[str, Any]] = {}
    # Each half is a sum over its samples, so the mean is the sum of both halves divided by the number of samples.
    for name in halves[samples.domains[0]][0]:
        whole = {
            domain: (first[name] + second[name]) / len(chosen)
            for (domain, (first, second)), chosen in zip(halves.items(), windows, strict=True)
        }
        pairs = [(f"{a}|{b}", whole[a], whole[b]) for a, b in combinations(samples.domains, 2)]
        groups[name] = {
            "cosine": {pair: _cosine(a, b) for pair, a, b in pairs},
            "ratio": {pair: _ratio(float(a.norm()), float(b.norm())) for pair, a, b in pairs},
            "within": {domain: _cosine(first[name], second[name]) for domain, (first, second) in halves.items()},
        }
    return groups


@torch.enable_grad()
def _gradient(
    transformer: LatentTransformer, samples: LatentSamples, windows: Windows, batch_size: int
) -> dict[str, Tensor]:
    """Gradient of the error summed over windows, flat float64 by group of parameters; zero if there are no windows."""
    parameters = list(transformer.parameters())
    sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    device, dtype = parameters[0].device, parameters[0].dtype
    for start in range(0, len(windows), batch_size):
        batch = samples.batch(windows[start : start + batch_size]).to(device, dtype)
        loss = sample_mse(transformer(*batch.inputs).latent_BCxyz, batch.target_BCxyz).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient
    parts: dict[str, list[Tensor]] = {}
    for parameter, total in zip(parameters, sums, strict=True):
        group = marks(parameter).group
        if marks(parameter).per_expert:
            for expert, part in enumerate(total):
                parts.setdefault(f"{group} {expert}", []).append(part.flatten())
        else:
            parts.setdefault(group, []).append(total.flatten())
    return {group: torch.cat(tensors) for group, tensors in parts.items()}


def _cosine(a: Tensor, b: Tensor) -> float | None:
    norms = float(a.norm()) * float(b.norm())
    if not (math.isfinite(norms) and norms > 0):
        return None
    # Rounding must not leave [-1, 1].
    return max(-1.0, min(1.0, float(a @ b) / norms))


def _ratio(a: float, b: float) -> float | None:
    return a / b if math.isfinite(a) and math.isfinite(b) and b > 0 else None
