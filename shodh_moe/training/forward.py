"""The forward pass and losses of one micro-batch, with an exchange of tokens or of samples between ranks.

Both compute the same. With an exchange of samples (`parallel.SampleExchange`) a rank chooses the paths of its own
samples, sends each to the rank that holds its expert, and runs the network on the samples that it receives. Gradients
of parameters are sums over all ranks, so it does not matter which rank adds a sample's part. What concerns a rank's own
micro-batch stays there: the router's losses, the tokens that a capacity drops, and the norms of the errors.

With ``training.unroll`` U the model is applied U times, each time to what it has predicted. A sample travels once, with
all its targets, and keeps the paths that are chosen from its given latents (`predictions`).

With context parallelism a rank has a slab of each sample. The ranks of an expert-parallel group have the same slab, and
those of a context-parallel group choose the same paths, so all slabs of a sample move to one context-parallel group.

Shapes: B samples of this rank, R samples that it computes, U predictions of each, S tokens of a sample, H history, C
latent channels, x y z latent grid.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shodh_moe.config import Config
from shodh_moe.model import Context, LatentTransformer, Prediction, Routing
from shodh_moe.model.inputs import token_grid
from shodh_moe.model.rollout import predictions
from shodh_moe.model.routers import Decision
from shodh_moe.parallel import ExpertParallel, SampleExchange
from shodh_moe.tokenizer.latents import Batch
from shodh_moe.training.deepspeed_config import exchanges_samples
from shodh_moe.training.draws import add_noise
from shodh_moe.training.engine import Engine
from shodh_moe.training.losses import (
    Losses,
    add_router_losses,
    error_norms,
    errors,
    prediction_losses,
    total_loss,
)


class Result(NamedTuple):
    """What `forward` returns.

    Attributes:
        losses: the losses of this rank's samples. The gradient of ``loss`` is that of the samples that it computes.
        routing: the routing of this rank's samples in every MoE layer, in the first prediction; [] for a dense model.
        exchange: who computed which samples; None after an exchange of tokens.
    """

    losses: Losses
    routing: list[Routing]
    exchange: SampleExchange | None


def forward(
    engine: Engine,
    batch: Batch,
    config: Config,
    scale_D: Tensor | None = None,
    noise_BHCxyz: Tensor | None = None,
) -> Result:
    """Run the engine's transformer on one micro-batch (collective).

    Args:
        batch: this rank's samples, or its slab of them, on the engine's device and in its dtype.
        scale_D: see `error_norms`.
        noise_BHCxyz: for the history that the model sees (`draw_noise`); None: it sees the history as it is.
    """
    norm_BU = error_norms(config.training.loss, batch, scale_D, engine.cp)  # of the latents without noise
    if noise_BHCxyz is not None:
        noisy = add_noise(batch.history_BHCxyz, noise_BHCxyz, config.training.history_noise, engine.cp)
        batch = batch._replace(history_BHCxyz=noisy)
    if exchanges_samples(config, engine.ep.size):
        return _with_samples(engine, batch, config, norm_BU)
    found = _unrolled(engine, config, *batch.inputs)
    return Result(total_loss(found, batch, config, norm_BU, engine.cp), found[0].routing, None)


def _unrolled(engine: Engine, config: Config, history: Tensor, geometry: Tensor, context: Context) -> list[Prediction]:
    """Make the U predictions of ``training.unroll``, one after the other."""
    assert isinstance(engine.model, LatentTransformer)
    through = config.training.unroll_gradient == "through"
    chain = predictions(engine.model, history, geometry, context, engine, through)
    return list(islice(chain, config.training.unroll))


def _with_samples(engine: Engine, batch: Batch, config: Config, norm_BU: Tensor) -> Result:
    model, kind = engine.model, config.training.loss
    assert isinstance(model, LatentTransformer)
    assert model.path is not None
    samples = len(batch.domain_B)
    z_BSI = model.embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz)
    plan = model.path.decide(z_BSI, token_grid(batch.geometry_BCxyz, config.model.patch), batch.inputs[2])
    decided = Decision(plan.gating.expert_N.view(samples, -1)[:, 0], _kept(plan.routing, plan.capacity, samples))

    experts = config.model.moe.num_experts
    holder_B = engine.ep.holders(experts, decided.expert_B.device)[decided.expert_B]
    exchange = SampleExchange(engine.ep, holder_B, config.parallel.exchange_capacity)
    weight_B = torch.full_like(norm_BU[:, 0], 1 / samples)
    own = _Samples(batch, decided.expert_B, norm_BU, weight_B, decided.kept_BS)
    there = own.sent(exchange).or_blank(engine.ep, experts)

    received = there.batch
    decision = Decision(there.expert_B, there.kept_BS, local=not exchange.strangers)
    history, geometry, context = received.inputs
    found = _unrolled(engine, config, history, geometry, replace(context, decision=decision))
    error_RU = errors(found, received, engine.cp)
    mine = (prediction_losses(kind, error_RU, there.norm_BU).mean(1) * there.weight_B).sum()

    error_BU = exchange.send_back(error_RU[: exchange.computed_G[engine.ep.rank]])
    predicted = prediction_losses(kind, error_BU, norm_BU).mean()
    routing = [plan.routing] * len(model.moe_layers)
    losses = add_router_losses(predicted, error_BU, routing, config, engine.cp)
    return Result(losses._replace(loss=_AddGradient.apply(losses.loss, mine)), routing, exchange)


def _kept(routing: Routing, capacity: int | None, samples: int) -> Tensor | None:
    """Whether each token found a slot at its expert, [B, S]; None if no token can be dropped."""
    return None if capacity is None else routing.kept_N.view(samples, -1)


class _Samples(NamedTuple):
    """Samples with what has to travel with them.

    Attributes:
        batch: the samples themselves.
        expert_B, kept_BS: see `Decision`.
        norm_BU: see `error_norms`.
        weight_B: weight of the sample's loss in the loss of its own rank.
    """

    batch: Batch
    expert_B: Tensor
    norm_BU: Tensor
    weight_B: Tensor
    kept_BS: Tensor | None

    def sent(self, exchange: SampleExchange) -> _Samples:
        """Return the samples that this rank computes."""
        sent = [*self.batch, *self[1:4], *(() if self.kept_BS is None else (self.kept_BS,))]
        received = exchange.send(sent)
        batch, rest = Batch(*received[: len(self.batch)]), received[len(self.batch) :]
        return _Samples(batch, rest[0], rest[1], rest[2], None if self.kept_BS is None else rest[3])

    def or_blank(self, ep: ExpertParallel, experts: int) -> _Samples:
        """Return the samples, or if there are none one of weight 0: no kernel must handle an empty batch.

        Its error is 1, since the square root in one of the losses has no gradient at 0.
        """
        if len(self.expert_B):
            return self
        blank = [column.new_zeros(1, *column.shape[1:]) for column in self.batch]
        batch = Batch(*blank)._replace(targets_BUCxyz=blank[2] + 1)
        expert_B = self.expert_B.new_full((1,), ep.local_experts(experts)[0])
        norm_BU, weight_B = self.norm_BU.new_ones(1, self.norm_BU.shape[1]), self.weight_B.new_zeros(1)
        kept_BS = None if self.kept_BS is None else self.kept_BS.new_ones(1, self.kept_BS.shape[1])
        return _Samples(batch, expert_B, norm_BU, weight_B, kept_BS)


class _AddGradient(torch.autograd.Function):
    """Return ``value`` with the gradients of ``value`` and ``other``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad
