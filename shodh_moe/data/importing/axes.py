"""Compare the axes of an array with those of the mapping."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shodh_moe.base.errors import UserError
from shodh_moe.formats import Array


def stored_axes(axes: Sequence[str], array: Array, components: int = 0) -> list[str]:
    """Return the axes of an array after checking its shape and the names of its dimensions.

    Args:
        components: expected length of the component axis; 0 for a scalar, which has no such axis, or one of length 1.
    """
    stored = list(axes)
    if not components and "c" in stored and len(array.shape) == len(stored) - 1:
        stored.remove("c")
    if len(array.shape) != len(stored):
        wanted = stored if components else [axis for axis in axes if axis != "c"]
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes {_shown(wanted)}")
    named = [_axis_of(name) or axis for name, axis in zip(array.dimensions, stored, strict=False)]
    if named and named != stored:
        cure = f" to {_shown(named)}" if sorted(named) == sorted(stored) else ""
        raise UserError(
            f"{array.path}: {array.name} has the dimensions ({', '.join(array.dimensions)}), but the mapping's axes "
            f"are {_shown(stored)}: correct axes{cure}"
        )
    found = array.shape[stored.index("c")] if "c" in stored else 1
    wanted_length = components or 1
    if found != wanted_length:
        raise UserError(
            f"{array.path}: {array.name} has shape {array.shape}, expected {wanted_length} along c of {_shown(stored)}"
            + ("; if it holds more than the velocity, say what in `components`" if found > components > 0 else "")
        )
    return stored


def _axis_of(dimension: str) -> str:
    """Return the axis that the name of a dimension states, such as x for nx; "" if it states none."""
    name = dimension.lower()
    if match := re.fullmatch(r"(?:n|dim_?)?([xyzt])(?:_?(?:c|dim|coord|coor))?", name):
        return match[1]
    return "t" if name in ("time", "times") else "c" if name in ("component", "components") else ""


def _shown(axes: Sequence[str]) -> str:
    return f"[{', '.join(axes)}]"
