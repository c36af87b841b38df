"""Compare the axes of an array with those of the mapping."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.array_files import Array


def stored_axes(axes: Sequence[str], array: Array, vector: bool) -> list[str]:
    """Return the axes of an array after checking its shape: a scalar has no component axis, or one of length 1."""
    stored = list(axes)
    if not vector and "c" in stored and len(array.shape) == len(stored) - 1:
        stored.remove("c")
    fits = len(array.shape) == len(stored) and (vector or "c" not in stored or array.shape[stored.index("c")] == 1)
    if not fits:
        wanted = stored if vector else [axis for axis in axes if axis != "c"]
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes {_shown(wanted)}")
    named = [_axis_of(name) or axis for name, axis in zip(array.dimensions, stored, strict=False)]
    if named and named != stored:
        cure = f" to {_shown(named)}" if sorted(named) == sorted(stored) else ""
        raise UserError(
            f"{array.path}: {array.name} has the dimensions ({', '.join(array.dimensions)}), but the mapping's axes "
            f"are {_shown(stored)}: correct axes{cure}"
        )
    if vector and "c" in stored and array.shape[stored.index("c")] != 3:
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected 3 along c of {_shown(stored)}")
    return stored


def _axis_of(dimension: str) -> str:
    """Return the axis that the name of a dimension states, such as x for nx; "" if it states none."""
    name = dimension.lower()
    if match := re.fullmatch(r"(?:n|dim_?)?([xyzt])(?:_?(?:c|dim|coord|coor))?", name):
        return match[1]
    return "t" if name in ("time", "times") else "c" if name in ("component", "components") else ""


def _shown(axes: Sequence[str]) -> str:
    return f"[{', '.join(axes)}]"
