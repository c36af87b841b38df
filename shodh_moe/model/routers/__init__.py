"""Routers choose an expert for each token. `Router` is the protocol, and `config.routers.ROUTERS` the registry."""

from __future__ import annotations

from pkgutil import resolve_name

from shodh_moe.config import RouterConfig
from shodh_moe.config.routers import ROUTERS
from shodh_moe.model.routers.frozen import freeze
from shodh_moe.model.routers.router import ONE_SAMPLE, Context, Router, Slots

__all__ = ["ONE_SAMPLE", "Context", "Router", "Slots", "make_router"]


def make_router(config: RouterConfig, dim: int, num_experts: int) -> Router:
    """Make the router of one layer.

    Args:
        config: ``model.moe.router``.
        dim: model width D.
        num_experts: E.
    """
    router = resolve_name(ROUTERS[config.kind])(dim, num_experts, config)
    return freeze(router) if config.frozen else router
