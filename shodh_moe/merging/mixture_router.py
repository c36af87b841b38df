"""The router of a merged mixture: its weights follow from training samples of each expert's domain (DESIGN 3.5).

Domain experts have no router that could tell their domains apart: dense networks have none, and with a single expert
the softmax is 1 whatever the scores, so that nothing is learned.

Shapes: M rows that the router scores, F features of a row, R routing width, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig
from shodh_moe.kernels.cosine_gating import reference_logits
from shodh_moe.merging.mixture_tensors import ROUTER
from shodh_moe.model.inputs import embedding_inputs
from shodh_moe.model.path import Features
from shodh_moe.model.routers.cosine import CosineRouter
from shodh_moe.tokenizer.latents import LatentSamples, load_latents

SAMPLES = 512  # training samples to look at, in equal numbers from each domain
ROWS = 4096  # largest number of rows, in equal numbers from each domain
_REMEDY = "choose another router.context or a larger router.dim, or the kind oracle"
PURE = 0.99  # share of a domain's rows on its own path, as in the word "bifurcated" of DESIGN 3.6


@torch.no_grad()
def router_weights(
    model: ModelConfig, domains: list[str], folders: list[Path], seed: int
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return a cosine router's weights by name, what the manifest records of it, and warnings for the user.

    The projection's rows are the leading directions of the centred features of all domains, as before the first step
    of a training; the prototype of expert e is the centre of its own domain's rows. tau is its lower limit, so that
    the chosen expert's probability, which scales its output, is nearly 1.

    Args:
        model: section ``model`` of the mixture.
        domains: each expert's domain.
        folders: each expert's folder of cached latents.
        seed: draws the directions that too few rows leave open.

    Raises:
        UserError: the latents cannot be read, are not finite, or have no samples of a domain or an unsuitable grid.
    """
    features, rows = None, []
    for domain, folder in zip(domains, folders, strict=True):
        samples = _samples(folder, domain, model)
        grid = [size // model.patch for size in samples.trajectories[0].z.shape[2:]]
        inputs = (model.history + 1) * samples.trajectories[0].z.shape[1] * model.patch**3
        made = Features(inputs, grid, model.moe)
        if features is not None and made.width != features.width:
            raise UserError(f"latents {folder} have other channels than those of {domains[0]}: give one `latents`")
        features = made
        rows.append(_rows(samples, features, model, len(domains)))
    assert features is not None
    few = min(len(one) for one in rows)
    rows = [_spaced(one, few) for one in rows]
    torch.manual_seed(seed)
    router = CosineRouter(features.width, len(domains), model.moe.router)
    router.start_projection(torch.cat(rows))
    q_EMR = [F.linear(one, router.projection.weight) for one in rows]
    router.prototypes_ER.copy_(torch.stack([q_MR.mean(0) for q_MR in q_EMR]))
    router.log_temperature.fill_(math.log(model.moe.router.min_temperature))
    record = {}
    for e, domain in enumerate(domains):
        p_ME = reference_logits(q_EMR[e], router.prototypes_ER, router.temperature).softmax(1)
        gate_M, chosen_M = p_ME.max(1)
        record[domain] = {"purity": float((chosen_M == e).double().mean()), "gate": float(gate_M.mean())}
    warnings = [
        f"the merged router sends only {one['purity']:.1%} of {domain}'s training samples to its own path: {_REMEDY}"
        for domain, one in record.items()
        if one["purity"] < PURE
    ]
    weights = {ROUTER + name: tensor.detach().clone() for name, tensor in router.state_dict().items()}
    return weights, {"rows_per_domain": few, "domains": record}, warnings


def _samples(folder: Path, domain: str, model: ModelConfig) -> LatentSamples:
    """The training samples of one domain."""
    trajectories = load_latents(folder, "train")
    own = [one for one in trajectories if one.domain == domain]
    if not own:
        there = ", ".join(sorted({one.domain for one in trajectories}))
        raise UserError(f"latents {folder} have no domain {domain}, only {there}: correct `domain`, or give `latents`")
    return LatentSamples(own, model.history, strides=model.strides)


def _rows(samples: LatentSamples, features: Features, model: ModelConfig, experts: int) -> Tensor:
    """What the router sees of samples at equal distances among all: float32 [M, F]."""
    count = samples.sizes[0]
    rows, most = [], -(-ROWS // experts)
    chosen = _spaced(torch.arange(count), max(SAMPLES // experts, 1)).tolist()
    for number in chosen:
        fitting = samples.fitting_strides(0, number)
        batch = samples.batch([(0, number)], [fitting[number % len(fitting)]])
        z_BSI = embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz, model)
        x_MF, _ = features(z_BSI)
        rows.append(_spaced(x_MF, max(most // len(chosen), 1)).clone())
    x_MF = torch.cat(rows)
    if not x_MF.isfinite().all():
        raise UserError(f"the latents of {samples.domains[0]} have NaN or infinity: encode them again")
    return x_MF


def _spaced(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, at equal distances."""
    return rows[torch.arange(count) * len(rows) // count] if len(rows) > count else rows
