"""Linear router: logits = W h."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, top1_gating
from shodh_moe.model.routers.router import Context, Slots


class LinearRouter(nn.Module):
    """One logit per expert from a matrix [E, D], without a temperature."""

    temperature = None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.projection = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_ND: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(dtype), self.projection.weight.to(dtype))
            return top1_gating(logits_NE, slots.capacity, slots.drop_order, None, slots.check_finite)
