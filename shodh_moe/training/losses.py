"""The loss of pretraining: one of several norms of the prediction's error, plus the router's losses.

Shapes: B samples, D domains, L layers, E experts, H history, C latent channels, x y z latent grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.config import Config
from shodh_moe.metrics.latents import sample_mse
from shodh_moe.model import Prediction, Routing
from shodh_moe.parallel import ALONE, ContextParallel, sum_over_ranks
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


def total_loss(
    prediction: Prediction, batch: Batch, config: Config, scale_D: Tensor | None = None, cp: ContextParallel = ALONE
) -> Losses:
    """Compute the losses of a micro-batch. The router's losses are means over layers, and 0 for a dense model.

    Args:
        batch: the samples predicted, on one device and in one dtype with the prediction.
        scale_D: mean squared change from snapshot to snapshot of each domain, divided by its mean over domains; only
            ``training.loss`` domain needs it.
        cp: the ranks that have the other slabs of the samples. All get the losses of the whole samples.
    """
    error_B = cp.mean(sample_mse(prediction.latent_BCxyz, batch.target_BCxyz))
    norm_B = error_norms(config.training.loss, batch, scale_D, cp)
    predicted = prediction_losses(config.training.loss, error_B, norm_B).mean()
    return add_router_losses(predicted, error_B, prediction.routing, config, cp)


def prediction_losses(kind: str, error_B: Tensor, norm_B: Tensor) -> Tensor:
    """Loss of each sample, [B], by the kind ``training.loss``, from its latent MSE and its norm (`error_norms`)."""
    return (error_B / norm_B).sqrt() if kind == "relative" else error_B / norm_B


def add_router_losses(
    predicted: Tensor, error_B: Tensor, routing: list[Routing], config: Config, cp: ContextParallel = ALONE
) -> Losses:
    """Add the router's losses to the mean loss of the samples.

    They are those of the micro-batch. With context parallelism, their mean over the ranks of the CP group is.

    With ``router.balance`` global or bias, the balance loss and the factor in front of the router's losses are those of
    all ranks (collective), so that a step depends on its samples only, and not on the number of ranks that share them.
    """
    router = config.model.moe.router
    balance, z, commitment = (
        torch.stack([getattr(r, name) for r in routing]).mean() if routing else predicted.new_zeros(())
        for name in ("balance_loss", "z_loss", "commitment_loss")
    )
    factor = predicted.detach()
    over_all = router.balance != "loss"
    if routing and (over_all or cp.size > 1):
        factor, fraction_LE = _over_ranks(predicted, routing, None if over_all else cp.group)
        mean_p_LE = torch.stack([r.mean_p_E for r in routing])
        balance = mean_p_LE.shape[1] * (mean_p_LE * fraction_LE).sum(1).mean()
    shares = router.z_weight * z + router.commitment_weight * commitment
    if router.balance != "bias":
        shares = router.balance_weight * balance + shares
    return Losses(predicted + factor * shares, predicted, balance, z, commitment, error_B.detach())


def _over_ranks(predicted: Tensor, routing: list[Routing], group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The mean of ``predicted`` over a group of ranks, and each expert's share of their choices, [L, E] (collective).

    Args:
        group: the ranks; None: all.
    """
    routed_LE = torch.stack([r.routed_E for r in routing]).double()
    table = torch.cat([predicted.detach().double()[None], routed_LE.new_ones(1), routed_LE.flatten()])
    table = sum_over_ranks(table, group=group)
    load_LE = table[2:].view_as(routed_LE)
    fraction_LE = load_LE / load_LE.sum(1, keepdim=True)
    return (table[0] / table[1]).to(predicted.dtype), fraction_LE.to(routing[0].mean_p_E.dtype)


def error_norms(kind: str, batch: Batch, scale_D: Tensor | None, cp: ContextParallel = ALONE) -> Tensor:
    """What each sample's squared error is divided by, [B], by the kind ``training.loss``.

    With the kind sample it depends on all samples of the micro-batch.
    """
    target_BCxyz = batch.target_BCxyz
    if kind == "domain":
        assert scale_D is not None
        return scale_D.to(target_BCxyz)[batch.domain_B]
    if kind == "sample":
        change_B = cp.mean(sample_mse(batch.history_BHCxyz[:, -1], target_BCxyz))
        return torch.maximum(change_B, LEAST_CHANGE * change_B.mean())
    if kind == "relative":
        return cp.mean(sample_mse(target_BCxyz, torch.zeros_like(target_BCxyz)))
    return torch.ones_like(batch.domain_B, dtype=target_BCxyz.dtype)
