"""The plan of a forward pass or layer: which expert takes each token, and how the tokens travel there and back.

Shapes: N tokens, M rows that the router scores, F features of a row, E experts, L local experts, G ranks of the
expert-parallel group, K slots per expert and rank, D width, J experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.tensors import sent_numbers
from shodh_moe.config import MoEConfig
from shodh_moe.kernels import Gating, combine, dispatch, expert_capacity
from shodh_moe.model.routers import Context, Decision, Router, Slots
from shodh_moe.model.routing import Routing, routing_of
from shodh_moe.parallel import ExpertParallel


@dataclass(frozen=True)
class Plan:
    """A router's decision for N tokens, and what the ranks agreed on to carry it out.

    Attributes:
        gating: the decision.
        routing: its record.
        capacity: slots per expert and rank, K; None: dropless, experts take all their tokens.
        received_GL: number of rows that each rank sends to each local expert, int64; None on a GPU with a capacity,
            where reading the counts would wait for the device, and if nothing travels.
        local: whether every rank holds the experts of all its tokens, so that none travels.
        dropped: number of tokens that no expert takes although there is no capacity.
        placement: see `ExpertParallel`; the order of the experts in ``received_GL``, but not in ``gating``.
    """

    gating: Gating
    routing: Routing
    capacity: int | None
    received_GL: Tensor | None
    local: bool = False
    dropped: int = 0
    placement: list[int] | None = None

    @property
    def by_place(self) -> Plan:
        """The same plan, in which experts are numbered by their place instead."""
        # A plan that caches itself would be a cycle, whose tensors live until a garbage collection.
        return self if self.placement is None else self._moved

    @cached_property
    def _moved(self) -> Plan:
        assert self.placement is not None
        gating = self.gating
        order_E = sent_numbers(self.placement, gating.expert_N.device)
        moved = gating._replace(
            expert_N=torch.argsort(order_E)[gating.expert_N],
            routed_E=gating.routed_E[order_E],
            kept_E=gating.kept_E[order_E],
        )
        return replace(self, gating=moved, placement=None)

    @cached_property
    def count_E(self) -> list[int]:
        """Number of this rank's tokens that each expert keeps. Waits for the device."""
        return self.gating.kept_E.tolist()

    @cached_property
    def splits(self) -> tuple[list[int], list[int]]:
        """Number of dropless rows to send to each rank, and to receive from it. Waits for the device."""
        assert self.received_GL is not None
        send_G = self.gating.kept_E.view(self.received_GL.shape[0], -1).sum(1)
        return send_G.tolist(), self.received_GL.sum(1).tolist()

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Permutation of the rows received dropless, from sorted by rank to sorted by expert, and its inverse."""
        assert self.received_GL is not None
        ranks, local = self.received_GL.shape
        local_L = torch.arange(local, device=self.received_GL.device)
        rows = sum(self.splits[1])  # without it, torch would wait for the device once more
        expert_R = torch.repeat_interleave(local_L.repeat(ranks), self.received_GL.flatten(), output_size=rows)
        order_R = torch.argsort(expert_R, stable=True)
        return order_R, torch.argsort(order_R)

    def dispatch(self, x_ND: Tensor) -> Tensor:
        """Copy this rank's tokens to their experts' rows: [E, K, D], or dropless [N J - dropped, D], by expert."""
        rows = dispatch(x_ND, self.gating.expert_N, self.gating.slot_N, self.gating.kept_E, self.capacity)
        return rows[: len(rows) - self.dropped]

    def combine(self, rows: Tensor, shared_ND: Tensor | None) -> Tensor:
        """Return shared_n + sum_e p_e row_ne for each token n: [N, D] in the dtype of ``rows``."""
        g = self.gating
        rows = F.pad(rows, (0, 0, 0, self.dropped)) if self.dropped else rows
        return combine(rows, g.expert_N, g.slot_N, g.gate_N, g.kept_E, shared_ND)


def moe_capacity(config: MoEConfig, tokens: int) -> int:
    """Slots per expert, K, for this number of tokens, each of which visits ``top_k`` experts (`expert_capacity`)."""
    return expert_capacity(tokens * config.top_k, config.num_experts, config.capacity_factor, config.min_capacity)


def make_plan(
    router: Router,
    x_MF: Tensor,
    context: Context,
    config: MoEConfig,
    ep: ExpertParallel,
    training: bool,
    layer: int = 0,
    row_N: Tensor | None = None,
) -> Plan:
    """Route tokens, and agree with the other ranks of the group on the sizes of the exchanges (collective).

    Args:
        x_MF: what the router sees.
        config: ``model.moe``.
        training: whether the capacity of training applies, unless the config is dropless.
        layer: recorded with the exchange of counts.
        row_N: the row that decides for each token; None: row n decides for token n.

    Raises:
        UserError: ranks of the group have different numbers of tokens or slots.
    """
    tokens = len(x_MF if row_N is None else row_N)
    capacity = None
    if not config.dropless and (training or context.drop):
        capacity = moe_capacity(config, tokens)
        ep.check_same_tokens(tokens, capacity, x_MF.device)
    # If one rank raised alone, the others would wait for it in the exchange forever.
    check_finite = not training and ep.size == 1
    slots = Slots(capacity or tokens, config.drop_order, check_finite, row_N, top_k=config.top_k)
    gating = router(x_MF, context, slots)
    plan = Plan(gating, routing_of(gating), capacity, None, placement=ep.placement)
    if x_MF.device.type != "cpu" and capacity is not None:
        return plan
    return replace(plan, received_GL=ep.exchange_counts(plan.by_place.gating.kept_E, layer))


def follow_plan(
    router: Router, x_BF: Tensor, context: Context, decision: Decision, ep: ExpertParallel, row_N: Tensor
) -> Plan:
    """Make the plan of samples whose paths are chosen already (collective unless the decision is local).

    No capacity applies, because the decision names the tokens that are dropped.

    Args:
        x_BF: what the router sees of each sample.
        row_N: the sample of each token.
    """
    gating = router(x_BF, context, Slots(len(row_N), check_finite=False, row_N=row_N, decision=decision))
    dropped = 0 if decision.kept_BS is None else int((~decision.kept_BS).sum())
    plan = Plan(gating, routing_of(gating), None, None, decision.local, dropped, ep.placement)
    return plan if decision.local else replace(plan, received_GL=ep.exchange_counts(plan.by_place.gating.kept_E))
