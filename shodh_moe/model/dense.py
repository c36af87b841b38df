"""Dense feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from shodh_moe.config import MoEConfig
from shodh_moe.model.experts import shared_experts, sum_outputs
from shodh_moe.model.plan import Plan
from shodh_moe.model.routers import Context


class Dense(nn.Module):
    """A feed-forward block without routed experts: y = sum_j Shared_j(h).

    The sum equals one SwiGLU network whose hidden width is that of all shared experts together.
    """

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        self.shared = shared_experts(dim, config)

    def forward(self, x_ND: Tensor, context: Context | None = None, plan: Plan | None = None) -> tuple[Tensor, None]:
        """See `FeedForwardBlock`."""
        y_ND = sum_outputs(self.shared, x_ND)
        assert y_ND is not None  # the config ensures at least one shared expert
        return y_ND.to(x_ND.dtype), None
