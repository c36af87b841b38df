"""Routers choose an expert for each token. `Router` is the protocol, and `config.routers.ROUTERS` the registry."""

from __future__ import annotations

from pkgutil import resolve_name

from shodh_moe.base.parameters import mark
from shodh_moe.config import RouterConfig
from shodh_moe.config.routers import ROUTERS
from shodh_moe.model.routers.frozen import freeze
from shodh_moe.model.routers.grown import GrownRouter
from shodh_moe.model.routers.router import ONE_SAMPLE, Context, Decision, Router, Slots

__all__ = ["ONE_SAMPLE", "Context", "Decision", "Router", "Slots", "make_router"]


def make_router(config: RouterConfig, dim: int, num_experts: int) -> Router:
    """Make a router, whose parameters are marked.

    Args:
        config: ``model.moe.router``.
        dim: number of features D of a row.
        num_experts: E.
    """
    router: Router = resolve_name(ROUTERS[config.kind])(dim, num_experts - len(config.added), config)
    if config.added:
        router = GrownRouter(router, dim, num_experts, config.added)
    for parameter in router.parameters():
        mark(parameter, group="router", lr_scale=config.lr_scale)
    return freeze(router) if config.frozen else router
