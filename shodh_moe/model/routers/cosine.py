"""Cosine router: similarity of projected tokens to learned prototypes (DESIGN 3.5; X-MoE, arXiv 2204.09179).

Shapes: N tokens, D model width, R routing width, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shodh_moe.base.parameters import mark
from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, cosine_top1_gating
from shodh_moe.model.routers.router import Context, Slots


class CosineRouter(nn.Module):
    """q = W_q h, logit_e = <q, P_e> / (|q| |P_e|) / tau, with learned prototypes P and a learned, floored tau."""

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.min_temperature = config.min_temperature
        self.projection = nn.Linear(dim, config.dim, bias=False)
        self.prototypes_ER = nn.Parameter(torch.randn(num_experts, config.dim))
        mark(self.prototypes_ER, decay=False)  # only their direction matters
        # One element, not a scalar: DeepSpeed cannot broadcast parameters without an axis.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))

    @property
    def temperature(self) -> Tensor:
        """tau, one element, without gradient."""
        return self._temperature(torch.float32).detach()

    def _temperature(self, dtype: torch.dtype) -> Tensor:
        return self.log_temperature.to(dtype).exp().clamp(min=self.min_temperature)

    def forward(self, x_ND: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        capacity, drop_order, check_finite = slots
        with torch.autocast(x_ND.device.type, enabled=False):
            return cosine_top1_gating(
                x_ND,
                self.projection.weight.to(dtype),
                self.prototypes_ER.to(dtype),
                self._temperature(dtype),
                capacity,
                drop_order,
                None,
                check_finite,
            )
