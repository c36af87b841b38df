"""Top-1 soft-semantic router: scores of tokens against experts (DESIGN 3.5; ours, the paper gives no formula).

Shapes: N tokens, D model width, R routing width, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.config import RouterConfig


class Router(nn.Module):
    """Logits [N, E] in float32 (float64 stays float64), whatever the model's dtype.

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

    def forward(self, x_ND: Tensor) -> Tensor:
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        with torch.autocast(x_ND.device.type, enabled=False):
            q = F.linear(x_ND.to(dtype), self.projection.weight.to(dtype))
            if self.kind == "linear":
                return q
            cosine_NE = F.normalize(q, dim=1) @ F.normalize(self.prototypes_ER.to(dtype), dim=1).T
            return cosine_NE / self.log_temperature.to(dtype).exp().clamp(min=self.min_temperature)
