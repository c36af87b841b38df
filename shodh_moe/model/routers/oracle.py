"""Oracle router, a control experiment: each sample goes to the expert of its domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating
from shodh_moe.model.routers.router import Context, Slots, choose


class OracleRouter(nn.Module):
    """Sends every token of domain d to expert d modulo E with gate 1; it has no weights."""

    temperature = None
    bias_E = None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_MD: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`.

        Raises:
            UserError: the context does not name the samples' domains.
        """
        if context.domain_B is None:
            raise UserError(
                "model.moe.router.kind oracle needs each sample's domain, which a flow of your own does not have: "
                "use a model with another router"
            )
        expert_M = context.by_row(context.domain_B % self.num_experts, len(x_MD))
        # Probability exactly 1 for this expert and exactly 0 for the others.
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        logits_ME = x_MD.new_full((len(x_MD), self.num_experts), -torch.inf, dtype=dtype)
        logits_ME.scatter_(1, expert_M[:, None], 0.0)
        return choose(logits_ME, slots)

    def start(self, x_MD: Tensor, seed: int) -> None:
        """See `Router`: there are no weights."""
