"""Frozen router, a control experiment: any router that keeps its initial weights."""

from __future__ import annotations

from typing import TypeVar

from shodh_moe.base.parameters import mark
from shodh_moe.model.routers.router import Router

Kind = TypeVar("Kind", bound=Router)


def freeze(router: Kind) -> Kind:
    """Keep a router's weights as they are: no update and no weight decay.

    Their gradients are zero rather than missing, because every engine and ZeRO stage expects one per parameter.
    """
    for parameter in router.parameters():
        mark(parameter, lr_scale=0.0)
        parameter.register_hook(lambda gradient: 0 * gradient)
    return router
