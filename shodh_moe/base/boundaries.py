"""What each face of a box is: a wall, open, or one of a periodic pair."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("wall", "open", "periodic")  # as in the_well's schema, in lower case
UNKNOWN = "unknown"
UNKNOWN_CODE = -1

# The kinds of the low and of the high face of each axis.
Boundaries = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]
UNKNOWN_BOUNDARIES: Boundaries = ((UNKNOWN, UNKNOWN),) * 3


def codes_of(boundaries: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the number of each face's kind in `KINDS`, [3][2]; `UNKNOWN_CODE` for an unknown one."""
    return [[KINDS.index(kind) if kind in KINDS else UNKNOWN_CODE for kind in axis] for axis in boundaries]


def boundaries_of(kinds: Sequence[Sequence[str]]) -> Boundaries:
    """Return the kinds of the low and of the high face of each axis, [3][2], as `Boundaries`."""
    x, y, z = ((low, high) for low, high in kinds)
    return x, y, z
