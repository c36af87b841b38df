"""The feed-forward block of a layer: its protocol, and the function that makes it from the config."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from shodh_moe.config import MoEConfig
from shodh_moe.model.dense import Dense
from shodh_moe.model.moe import MoE
from shodh_moe.model.plan import Plan
from shodh_moe.model.routers import Context
from shodh_moe.model.routing import Routing
from shodh_moe.parallel import ExpertParallel


class FeedForwardBlock(Protocol):
    """A module that transforms each token by itself."""

    def __call__(self, x_ND: Tensor, context: Context, plan: Plan | None) -> tuple[Tensor, Routing | None]:
        """New tokens [N, D] in the dtype of ``x_ND``, and the routing; None if nothing was routed.

        ``plan`` is the network's plan for all layers; None if each layer makes its own.
        """


def make_feed_forward(dim: int, config: MoEConfig, ep: ExpertParallel, seed: int, layer: int) -> FeedForwardBlock:
    """A mixture of experts, or a dense block if the config has no routed experts.

    Args:
        dim: model width D.
        config: ``model.moe``.
        ep: which experts this rank holds.
        seed, layer: fix the initial weights of the routed experts.
    """
    return MoE(dim, config, ep, seed, layer) if config.num_experts else Dense(dim, config)
