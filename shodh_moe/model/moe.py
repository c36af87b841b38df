"""Sparse mixture of experts with capacity, sharded over an expert-parallel group (DESIGN 3.4, 3.5, 7).

Shapes: N local tokens, D model width, E experts, L local experts, K slots an expert and rank, G ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from shodh_moe.config import MoEConfig
from shodh_moe.kernels import combine, dispatch, expert_capacity
from shodh_moe.model.experts import Experts, FeedForward
from shodh_moe.model.router import Router
from shodh_moe.parallel import ExpertParallel, all_to_all


class Routing(NamedTuple):
    """What one MoE layer did with its N tokens; the two losses carry gradients, the rest does not."""

    balance_loss: Tensor
    z_loss: Tensor
    expert_N: Tensor
    kept_N: Tensor
    entropy_N: Tensor


class MoE(nn.Module):
    """y = sum_j Shared_j(h) + p_e * Expert_e(h), e the router's choice.

    While training, each expert takes at most ``capacity_factor * N / E`` tokens of each rank and the others
    pass through the shared experts alone. Outside training no token is dropped: the slots grow to the
    fullest expert of any rank of the group.
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
        tokens, width = x_ND.shape
        if self.training or self.drop_in_eval:
            capacity = expert_capacity(tokens, c.num_experts, c.capacity_factor, c.min_capacity)
            gating = self.router(x_ND, capacity, c.drop_order)
        else:
            gating = self.router(x_ND, tokens, c.drop_order)
            capacity = self.ep.max_over_group(int(gating.kept_E.max()))

        slots_EKD = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, capacity)
        sent_GLKD = slots_EKD.view(self.ep.size, -1, capacity, width)
        local_LTD = all_to_all(sent_GLKD, self.ep).transpose(0, 1).reshape(-1, self.ep.size * capacity, width)
        done_LTD = self.experts(local_LTD)
        back_GLKD = done_LTD.view(-1, self.ep.size, capacity, width).transpose(0, 1)
        slots_EKD = all_to_all(back_GLKD, self.ep).reshape(c.num_experts, capacity, width)

        shared_ND = None
        for expert in self.shared:
            shared_ND = expert(x_ND) if shared_ND is None else shared_ND + expert(x_ND)
        y_ND = combine(slots_EKD, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)
        kept_N = gating.slot_N >= 0
        return y_ND, Routing(gating.balance_loss, gating.z_loss, gating.expert_N, kept_N, gating.entropy_N)
