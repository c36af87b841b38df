"""The loss of pretraining: one of several norms of the prediction's error, plus the router's losses.

Shapes: B samples, U predictions of each, D domains, L layers, E experts, H history, C latent channels, x y z latent
grid.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    The latter is the mean over the predictions of the sample.

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
    predictions: Sequence[Prediction], batch: Batch, config: Config, norm_BU: Tensor, cp: ContextParallel = ALONE
) -> Losses:
    """Compute the losses of a micro-batch. The router's are means over layers and predictions, 0 for a dense model.

    Args:
        predictions: U predictions of the samples, one after the other.
        batch: the samples predicted, on one device and in one dtype with the predictions.
        norm_BU: see `error_norms`.
        cp: the ranks that have the other slabs of the samples. All get the losses of the whole samples.
    """
    error_BU = errors(predictions, batch, cp)
    predicted = prediction_losses(config.training.loss, error_BU, norm_BU).mean()
    routing = [layer for prediction in predictions for layer in prediction.routing]
    return add_router_losses(predicted, error_BU, routing, config, cp)


def errors(predictions: Sequence[Prediction], batch: Batch, cp: ContextParallel = ALONE) -> Tensor:
    """Latent MSE of each whole sample and prediction, [B, U]."""
    targets = batch.targets_BUCxyz.unbind(1)
    pairs = zip(predictions, targets, strict=True)
    return cp.mean(torch.stack([sample_mse(prediction.latent_BCxyz, target) for prediction, target in pairs], dim=1))


def prediction_losses(kind: str, error_BU: Tensor, norm_BU: Tensor) -> Tensor:
    """Loss of each prediction, [B, U], by the kind ``training.loss``, from its latent MSE and norm (`error_norms`)."""
    return (error_BU / norm_BU).sqrt() if kind == "relative" else error_BU / norm_BU


def add_router_losses(
    predicted: Tensor, error_BU: Tensor, routing: list[Routing], config: Config, cp: ContextParallel = ALONE
) -> Losses:
    """Add the router's losses, means over ``routing``, to the mean loss of the predictions.

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
    return Losses(predicted + factor * shares, predicted, balance, z, commitment, error_BU.detach().mean(1))


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
    """What the squared error of each prediction is divided by, [B, U], by the kind ``training.loss``.

    With the kind sample it is the change of the target from the snapshot before it, and depends on all samples of the
    micro-batch.

    Args:
        scale_D: mean squared change from snapshot to snapshot of each domain, divided by its mean over domains; only
            the kind domain needs it.
        cp: the ranks that have the other slabs of the samples.
    """
    targets = batch.targets_BUCxyz.unbind(1)
    if kind == "domain":
        assert scale_D is not None
        return scale_D.to(targets[0])[batch.domain_B][:, None].expand(-1, len(targets))
    if kind == "sample":
        before = (batch.history_BHCxyz[:, -1], *targets[:-1])
        change_BU = cp.mean(torch.stack([sample_mse(a, b) for a, b in zip(before, targets, strict=True)], dim=1))
        return torch.maximum(change_BU, LEAST_CHANGE * change_BU.mean(0))
    if kind == "relative":
        return cp.mean(torch.stack([sample_mse(target, torch.zeros_like(target)) for target in targets], dim=1))
    return torch.ones_like(batch.domain_B, dtype=targets[0].dtype)[:, None].expand(-1, len(targets))
