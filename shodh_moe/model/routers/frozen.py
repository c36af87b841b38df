"""Frozen parameters: those of a router as a control experiment, or all that the paths of a mixture share."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from shodh_moe.base.parameters import mark, marks
from shodh_moe.model.routers.router import Router

Kind = TypeVar("Kind", bound=Router)


def freeze(router: Kind) -> Kind:
    """Keep a router's weights as they are."""
    for parameter in router.parameters():
        _keep(parameter)
    return router


def freeze_shared(model: nn.Module) -> None:
    """Keep all weights but those that each path has for itself, and those of paths without samples.

    Adam changes nothing where all gradients have been zero, but weight decay would; so no weights decay.
    """
    for parameter in model.parameters():
        if marks(parameter).per_expert:
            mark(parameter, decay=False)
        else:
            _keep(parameter)


def _keep(parameter: nn.Parameter) -> None:
    """No update and no weight decay. The gradient is zero, not missing: every engine and ZeRO stage expects one."""
    mark(parameter, lr_scale=0.0)
    parameter.register_hook(lambda gradient: 0 * gradient)
