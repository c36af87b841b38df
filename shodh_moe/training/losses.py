"""The loss of pretraining: one of several norms of the prediction's error, plus the router's losses.

Shapes: B samples, D domains, H history, C latent channels, x y z latent grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.config import Config
from shodh_moe.metrics.latents import sample_mse
from shodh_moe.model import Prediction
from shodh_moe.tokenizer.latents import Batch

# A sample that hardly changes would otherwise dominate the loss.
LEAST_CHANGE = 0.1  # relative to the mean of the micro-batch


class Losses(NamedTuple):
    """Losses of one micro-batch, 0-d, without weights except for ``loss``; and ``error_B``, each sample's latent MSE.

    ``loss`` = ``prediction_loss`` times (1 + the router's three losses, each times its weight), where the first factor
    has no gradient in front of the router's losses: their weights are shares of the prediction loss.
    """

    loss: Tensor
    prediction_loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    commitment_loss: Tensor
    error_B: Tensor


def total_loss(prediction: Prediction, batch: Batch, config: Config, scale_D: Tensor | None = None) -> Losses:
    """Compute the losses of a micro-batch. The router's losses are means over layers, and 0 for a dense model.

    Args:
        batch: the samples predicted, on one device and in one dtype with the prediction.
        scale_D: mean squared change from snapshot to snapshot of each domain, divided by its mean over domains; only
            ``training.loss`` domain needs it.
    """
    layers, router = prediction.routing, config.model.moe.router
    error_B = sample_mse(prediction.latent_BCxyz, batch.target_BCxyz)
    norm_B = _norm(config.training.loss, batch, scale_D)
    if config.training.loss == "relative":
        predicted = (error_B / norm_B).sqrt().mean()
    else:
        predicted = (error_B / norm_B).mean()
    balance, z, commitment = (
        torch.stack([getattr(r, name) for r in layers]).mean() if layers else predicted.new_zeros(())
        for name in ("balance_loss", "z_loss", "commitment_loss")
    )
    shares = router.balance_weight * balance + router.z_weight * z + router.commitment_weight * commitment
    return Losses(predicted + predicted.detach() * shares, predicted, balance, z, commitment, error_B.detach())


def _norm(kind: str, batch: Batch, scale_D: Tensor | None) -> Tensor:
    """What each sample's squared error is divided by, [B]."""
    target_BCxyz = batch.target_BCxyz
    if kind == "domain":
        assert scale_D is not None
        return scale_D.to(target_BCxyz)[batch.domain_B]
    if kind == "sample":
        change_B = sample_mse(batch.history_BHCxyz[:, -1], target_BCxyz)
        return torch.maximum(change_B, LEAST_CHANGE * change_B.mean())
    if kind == "relative":
        return sample_mse(target_BCxyz, torch.zeros_like(target_BCxyz))
    return torch.ones_like(batch.domain_B, dtype=target_BCxyz.dtype)
