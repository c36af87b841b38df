"""Linear router: logits = W h."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating
from shodh_moe.model.routers.router import Context, Slots, balancing_bias, choose


class LinearRouter(nn.Module):
    """One logit per expert from a matrix [E, D], without a temperature."""

    temperature = None
    bias_E: Tensor | None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.register_buffer("bias_E", balancing_bias(num_experts, config))
        self.projection = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_MD: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`."""
        with torch.autocast(x_MD.device.type, enabled=False):
            return choose(self.logits(x_MD), slots, self.bias_E)

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return the logits of each row, float32 or wider [M, E]."""
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        return F.linear(x_MD.to(dtype), self.projection.weight.to(dtype))

    def start(self, x_MD: Tensor, seed: int) -> None:
        """See `Router`: the random weights stay."""
