"""Sparse mixture of experts, sharded over an expert-parallel group (DESIGN 3.4, 3.5, 7).

Shapes: N local tokens, D model width, E experts, L local experts, K slots an expert and rank, G ranks, R rows that
the ranks of the group send here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shodh_moe.config import MoEConfig
from shodh_moe.kernels import Gating, combine, dispatch, expert_capacity
from shodh_moe.model.experts import Experts, FeedForward
from shodh_moe.model.router import Router
from shodh_moe.parallel import ExpertParallel, all_to_all, start_all_to_all


class Routing(NamedTuple):
    """What one MoE layer did with its N tokens; the two losses carry gradients, the rest does not."""

    balance_loss: Tensor
    z_loss: Tensor
    expert_N: Tensor
    kept_N: Tensor
    entropy_N: Tensor


class MoE(nn.Module):
    """y = sum_j Shared_j(h) + p_e * Expert_e(h), e the router's choice.

    In capacity mode, while training, each expert takes at most ``capacity_factor * N / E`` tokens of each rank, and
    the others pass through the shared experts alone. In dropless mode, and outside training always, experts take
    every token that chose them. The shared experts work while the tokens are on their way to the routed ones.
    """

    def __init__(self, dim: int, config: MoEConfig, ep: ExpertParallel, seed: int, layer: int):
        super().__init__()
        self.config, self.ep = config, ep
        self.router = Router(dim, config.num_experts, config.router)
        self.shared = nn.ModuleList(FeedForward(dim, config.expert_hidden) for _ in range(config.shared_experts))
        self.experts = Experts(dim, config.expert_hidden, ep.local_experts(config.num_experts), seed, layer)
        self.drop_in_eval = False  # evaluation switches this on to report what the training capacity would drop

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Routing]:
        c = self.config
        tokens = x_ND.shape[0]
        if not c.dropless and (self.training or self.drop_in_eval):
            capacity = expert_capacity(tokens, c.num_experts, c.capacity_factor, c.min_capacity)
            gating = self.router(x_ND, capacity, c.drop_order)
            y_ND = self._with_capacity(x_ND, gating, capacity)
        else:
            gating = self.router(x_ND, tokens, c.drop_order)
            y_ND = self._dropless(x_ND, gating)
        kept_N = gating.slot_N >= 0
        return y_ND, Routing(gating.balance_loss, gating.z_loss, gating.expert_N, kept_N, gating.entropy_N)

    def _with_capacity(self, x_ND: Tensor, gating: Gating, capacity: int) -> Tensor:
        """Every rank sends every expert ``capacity`` slots, filled or not."""
        experts, width = self.config.num_experts, x_ND.shape[1]
        slots_EKD = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, capacity)
        on_the_way = start_all_to_all(slots_EKD.view(self.ep.size, -1, capacity, width), self.ep)
        shared_ND = self._shared_experts(x_ND)
        local_LTD = on_the_way.wait().transpose(0, 1).reshape(-1, self.ep.size * capacity, width)
        done_LTD = self.experts(local_LTD)
        back_GLKD = done_LTD.view(-1, self.ep.size, capacity, width).transpose(0, 1)
        slots_EKD = all_to_all(back_GLKD, self.ep).reshape(experts, capacity, width)
        return combine(slots_EKD, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)

    def _dropless(self, x_ND: Tensor, gating: Gating) -> Tensor:
        """Every rank sends every expert just the tokens that chose it."""
        rows_ND = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, None)
        if self.ep.size == 1:
            shared_ND, rows_ND = self._shared_experts(x_ND), self.experts.grouped(rows_ND, gating.kept_E)
            return combine(rows_ND, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)
        received_GL = self.ep.exchange_counts(gating.kept_E)
        send, receive = gating.kept_E.view(self.ep.size, -1).sum(1).tolist(), received_GL.sum(1).tolist()
        on_the_way = start_all_to_all(rows_ND, self.ep, send, receive)
        shared_ND = self._shared_experts(x_ND)
        # What arrives is sorted by rank, then by expert; the experts want it by expert, then by rank.
        local_L = torch.arange(received_GL.shape[1], device=x_ND.device)
        expert_R = torch.repeat_interleave(local_L.repeat(self.ep.size), received_GL.flatten())
        order_R = torch.argsort(expert_R, stable=True)
        done_RD = self.experts.grouped(on_the_way.wait()[order_R], received_GL.sum(0))
        rows_ND = all_to_all(done_RD[torch.argsort(order_R)], self.ep, receive, send)
        return combine(rows_ND, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)

    def _shared_experts(self, x_ND: Tensor) -> Tensor | None:
        total_ND = None
        for expert in self.shared:
            total_ND = expert(x_ND) if total_ND is None else total_ND + expert(x_ND)
        return total_ND
