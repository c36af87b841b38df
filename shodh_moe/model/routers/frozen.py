"""A control experiment: a router that keeps its initial weights."""

from __future__ import annotations

from typing import TypeVar

from shodh_moe.base.parameters import hold
from shodh_moe.model.routers.router import Router

Kind = TypeVar("Kind", bound=Router)


def freeze(router: Kind) -> Kind:
    """Keep a router's weights as they are."""
    for parameter in router.parameters():
        hold(parameter)
    return router
