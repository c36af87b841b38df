"""Cosine router: similarity of projected tokens to learned prototypes (DESIGN 3.5; X-MoE, arXiv 2204.09179).

Shapes: M rows, D features, R routing width, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.parameters import mark
from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, cosine_topk_gating
from shodh_moe.kernels.cosine_gating import reference_logits
from shodh_moe.model.routers.kmeans import kmeans
from shodh_moe.model.routers.router import Context, Slots, balancing_bias, choose


class CosineRouter(nn.Module):
    """q = W_q h, logit_e = <q, P_e> / (|q| |P_e|) / tau, with learned prototypes P and a learned, floored tau."""

    bias_E: Tensor | None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.register_buffer("bias_E", balancing_bias(num_experts, config))
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

    def forward(self, x_MD: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`."""
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        with torch.autocast(x_MD.device.type, enabled=False):
            if slots.row_N is not None:  # few rows for many tokens: the fused kernel would score every token
                return choose(self.logits(x_MD), slots, self.bias_E)
            projection_RD, prototypes_ER = self.projection.weight.to(dtype), self.prototypes_ER.to(dtype)
            temperature = self._temperature(dtype)
            return cosine_topk_gating(
                x_MD, projection_RD, prototypes_ER, temperature,
                slots.capacity, slots.drop_order, self.bias_E, slots.check_finite, slots.top_k,
            )  # fmt: skip

    def logits(self, x_MD: Tensor) -> Tensor:
        """Return the logits of each row in plain torch, float32 or wider [M, E]."""
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        q_MR = F.linear(x_MD.to(dtype), self.projection.weight.to(dtype))
        return reference_logits(q_MR, self.prototypes_ER.to(dtype), self._temperature(dtype))

    @torch.no_grad()
    def start(self, x_MD: Tensor, seed: int) -> None:
        """See `Router`: prototypes are the centres of k-means of the rows, projected by `start_projection`.

        Prototypes for which there are too few rows keep their random weights.
        """
        projection_RD = self.start_projection(x_MD)
        centres_KR = kmeans(x_MD.double() @ projection_RD.T, len(self.prototypes_ER), seed)
        self.prototypes_ER[: len(centres_KR)] = centres_KR.to(self.prototypes_ER.dtype)

    @torch.no_grad()
    def start_projection(self, x_MD: Tensor) -> Tensor:
        """Project onto the leading directions of the centred rows; return the projection, float64 [R, D].

        The weight of the last feature, which is 1, subtracts the mean. Directions for which there are too few rows keep
        their random weights.
        """
        mean_D = x_MD.mean(0)
        directions = torch.linalg.svd((x_MD - mean_D).double(), full_matrices=False).Vh
        count = min(len(directions), len(self.projection.weight))
        projection_RD = self.projection.weight.double()
        projection_RD[:count] = directions[:count]
        projection_RD[:, -1] = 0
        projection_RD[:, -1] = -(projection_RD @ mean_D.double())
        self.projection.weight.copy_(projection_RD)
        return projection_RD
