"""A router in one file for test_routers: sample number n goes to expert n modulo E."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, topk_gating
from shodh_moe.model.routers import Context, Slots


class RoundRobinRouter(nn.Module):
    """Learns only its confidence in the choice."""

    temperature = None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.num_experts = num_experts
        self.confidence = nn.Parameter(torch.ones(1))

    def forward(self, x_ND: Tensor, context: Context, slots: Slots) -> Gating:
        expert_N = context.sample_M(x_ND) % self.num_experts
        logits_NE = self.confidence * nn.functional.one_hot(expert_N, self.num_experts)
        return topk_gating(logits_NE, slots.capacity, slots.drop_order, None, slots.check_finite)
