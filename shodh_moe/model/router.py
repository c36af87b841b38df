"""Top-1 soft-semantic router: scores of tokens against experts (DESIGN 3.5; ours, the paper gives no formula).

Shapes: N tokens, D model width, R routing width, E experts, K slots per expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, cosine_top1_gating, top1_gating


class Router(nn.Module):
    """Scores tokens [N, D] and gives each an expert and a slot, in float32 (float64 stays float64) under any autocast.

    ``cosine``: q = W_q h, logit_e = <q, P_e> / (|q| |P_e|) / tau with learned prototypes P and a learned,
    floored temperature (X-MoE, arXiv 2204.09179). ``linear``: logits = W h.
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.kind, self.min_temperature = config.kind, config.min_temperature
        if config.kind == "linear":
            self.projection = nn.Linear(dim, num_experts, bias=False)
        else:
            self.projection = nn.Linear(dim, config.dim, bias=False)
            self.prototypes_ER = nn.Parameter(torch.randn(num_experts, config.dim))
            # One element, not a scalar: DeepSpeed cannot broadcast parameters without an axis.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))

    @property
    def temperature(self) -> Tensor | None:
        """tau, one element, without gradient; None for the linear router."""
        return None if self.kind == "linear" else self._temperature(torch.float32).detach()

    def _temperature(self, dtype: torch.dtype) -> Tensor:
        return self.log_temperature.to(dtype).exp().clamp(min=self.min_temperature)

    def forward(self, x_ND: Tensor, capacity: int, drop_order: str, check_finite: bool = True) -> Gating:
        """See `kernels.top1_gating` for the arguments, the result and what is raised."""
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        projection = self.projection.weight.to(dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            if self.kind == "linear":
                return top1_gating(F.linear(x_ND.to(dtype), projection), capacity, drop_order, None, check_finite)
            prototypes_ER = self.prototypes_ER.to(dtype)
            tau = self._temperature(dtype)
            return cosine_top1_gating(x_ND, projection, prototypes_ER, tau, capacity, drop_order, None, check_finite)
