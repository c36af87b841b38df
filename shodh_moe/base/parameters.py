"""Marks on parameters: facts that training, checkpoints and reports need, set where a parameter is created.

Code that treats some parameters differently reads their marks; it never looks at their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Marks:
    """The marks of one parameter.

    Attributes:
        decay: whether weight decay applies. Default: matrices decay (two or more axes), vectors do not.
        per_expert: whether axis 0 counts experts.
        sharded: whether each rank holds only its own experts along axis 0. Default: all ranks hold the same.
        lr_scale: factor on the learning rate.
        group: name of the group of parameters to which reports add this one.
    """

    decay: bool
    per_expert: bool = False
    sharded: bool = False
    lr_scale: float = 1.0
    group: str = "rest"


def marks(parameter: Tensor) -> Marks:
    """Return the marks of a parameter, or the defaults if it has none."""
    found = getattr(parameter, "marks", None)
    return Marks(decay=parameter.dim() >= 2) if found is None else found


def mark(parameter: Tensor, **changes: Any) -> None:
    """Set some fields of a parameter's `Marks` and keep the others."""
    parameter.marks = replace(marks(parameter), **changes)  # type: ignore[attr-defined]


def mark_all(module: nn.Module, **changes: Any) -> None:
    """`mark` every parameter of a module."""
    for parameter in module.parameters():
        mark(parameter, **changes)


def hold(parameter: nn.Parameter, but: Callable[[], list[int]] | None = None) -> None:
    """Keep a parameter as it is during training: no update and no weight decay.

    Its gradient is zero rather than missing, because every engine and ZeRO stage expects one per parameter.

    Args:
        but: gives the indices along axis 0 of parts that learn, without weight decay; None: the whole parameter is
            held. It is asked in every backward pass, because experts can move between ranks. Ranks that hold other
            experts of a layer give [], so that all have the same optimizer groups.
    """
    if but is None:
        mark(parameter, lr_scale=0.0)
        parameter.register_hook(lambda gradient: 0 * gradient)
        return
    mark(parameter, decay=False)  # weight decay would change the other parts

    def learning(gradient: Tensor) -> Tensor:
        learns = gradient.new_zeros(len(gradient), *[1] * (gradient.dim() - 1))
        learns[but()] = 1
        return gradient * learns

    parameter.register_hook(learning)
