"""Top-1 soft-semantic router: scores of tokens against experts (DESIGN 3.5; ours, the paper gives no formula).

Shapes: N tokens, D model width, R routing width, E experts, K slots per expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, cosine_top1_gating, top1_gating


class Router(nn.Module):
    """Scores tokens [N, D] and gives each an expert and a slot, in float32 (float64 stays float64) under any autocast.

    ``cosine``: q = W_q h, logit_e = <q, P_e> / (|q| |P_e|) / tau with learned prototypes P and a learned,
    floored temperature (X-MoE, arXiv 2204.09179). ``linear``: logits = W h. ``oracle``, a control: the expert that the
    caller names for each token, with gate 1; it has no weights.

    A ``frozen`` one, a control too, keeps the weights that it was drawn with.
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.kind, self.min_temperature, self.num_experts = config.kind, config.min_temperature, num_experts
        self.frozen = config.frozen
        if config.kind == "linear":
            self.projection = nn.Linear(dim, num_experts, bias=False)
        elif config.kind == "cosine":
            self.projection = nn.Linear(dim, config.dim, bias=False)
            self.prototypes_ER = nn.Parameter(torch.randn(num_experts, config.dim))
            # One element, not a scalar: DeepSpeed cannot broadcast parameters without an axis.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        if config.frozen:
            for parameter in self.parameters():
                parameter.lr_scale = 0.0  # type: ignore[attr-defined]  # no weight decay either

    @property
    def temperature(self) -> Tensor | None:
        """tau, one element, without gradient; None if the router has none."""
        return None if self.kind != "cosine" else self._temperature(torch.float32).detach()

    def _temperature(self, dtype: torch.dtype) -> Tensor:
        return self._weight(self.log_temperature, dtype).exp().clamp(min=self.min_temperature)

    def _weight(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        # Gradients of zero, not none: every engine and ZeRO stage expects one for each parameter.
        return (parameter.detach() + 0 * parameter if self.frozen else parameter).to(dtype)

    def forward(
        self, x_ND: Tensor, capacity: int, drop_order: str, check_finite: bool = True, expert_N: Tensor | None = None
    ) -> Gating:
        """See `kernels.top1_gating` for the arguments, the result and what is raised.

        Args:
            expert_N: int64, where the oracle sends each token; the others do not look at it.

        Raises:
            UserError: the oracle was not told.
        """
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        if self.kind == "oracle":
            if expert_N is None:
                raise UserError(
                    "model.moe.router.kind oracle must be told each sample's domain, which your own flow does not say: "
                    "use a model with another router"
                )
            # Probability 1 there and 0 elsewhere, exactly.
            logits_NE = x_ND.new_full((len(x_ND), self.num_experts), -torch.inf, dtype=dtype)
            logits_NE.scatter_(1, expert_N[:, None], 0.0)
            return top1_gating(logits_NE, capacity, drop_order, None, check_finite)
        projection = self._weight(self.projection.weight, dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            if self.kind == "linear":
                return top1_gating(F.linear(x_ND.to(dtype), projection), capacity, drop_order, None, check_finite)
            prototypes_ER = self._weight(self.prototypes_ER, dtype)
            tau = self._temperature(dtype)
            return cosine_top1_gating(x_ND, projection, prototypes_ER, tau, capacity, drop_order, None, check_finite)
