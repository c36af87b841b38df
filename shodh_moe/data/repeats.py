"""Find what is stored twice: snapshots, and the two ends of a periodic axis."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Largest difference of the first and the last plane that counts as rounding, relative to that of the first two planes.
_SAME_PLANE = 1e-3


@dataclass(frozen=True)
class Repeat:
    """Snapshots that occur more than once.

    Attributes:
        file: the file in which they were found again.
        leak: whether the first occurrence is in another split.
        text: how many they are, and where they occur first.
    """

    file: str
    leak: bool
    text: str


@dataclass
class SeenSnapshots:
    """Hashes of all snapshots of a dataset, to find those that occur more than once."""

    _first: dict[bytes, tuple[str, str, int]] = field(default_factory=dict)
    _own: dict[tuple[str, int], dict[bytes, int]] = field(default_factory=dict)
    _within: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)
    _between: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)

    def add(self, file: str, split: str, sample: int, snapshot: int, fields_14XYZ: NDArray[np.float32]) -> None:
        """Add a snapshot [1, 4, X, Y, Z] of the trajectory ``sample`` of a file."""
        key = hashlib.blake2b(fields_14XYZ.tobytes(), digest_size=16).digest()
        earlier = self._own.setdefault((file, sample), {}).setdefault(key, snapshot)
        if earlier != snapshot:
            self._within.setdefault((file, sample), []).append((snapshot, earlier))
            return
        if not fields_14XYZ[:, :3].any():
            return  # all flows that start from rest share this snapshot
        other, other_split, other_sample = self._first.setdefault(key, (file, split, sample))
        if (other, other_sample) != (file, sample):
            self._between[file, split, other, other_split] += 1

    def repeats(self) -> Iterator[Repeat]:
        """List the repeats within each trajectory, then those between two."""
        for (file, _), found in self._within.items():
            what = f"{len(found)} snapshots are" if len(found) > 1 else "one snapshot is"
            here, earlier = found[0]
            text = f"{what} the same as an earlier one of the trajectory (snapshot {here} as {earlier})"
            yield Repeat(file, False, text)
        for (file, split, other, other_split), count in self._between.items():
            leak = split != other_split
            text = f"{count} snapshots are also in {other}" + (": the splits must not share any" if leak else "")
            yield Repeat(file, leak, text)


def has_repeated_end(u_3XYZ: NDArray[np.floating], axis: int, fluid_XYZ: NDArray[np.bool_]) -> bool | None:
    """Whether the last plane of an axis repeats the first, as in a periodic box stored with both of its ends.

    Planes that also fit a box stored once cannot tell: a flow at rest there, one that does not change along the axis,
    or one that is its own mirror image.

    Args:
        u_3XYZ: velocity; values that are not finite are left out.
        axis: 0, 1 or 2.

    Returns:
        None if the values cannot tell.
    """
    first, second, before, last = (np.take(u_3XYZ, index, axis + 1).astype(np.float64) for index in (0, 1, -2, -1))
    used = np.take(fluid_XYZ, [0, 1, -2, -1], axis).all(axis) & np.isfinite(first + second + before + last).all(0)
    step, mirror, end = (
        float(np.linalg.norm(difference[:, used])) for difference in (second - first, second - before, last - first)
    )
    if not (first[:, used].any() and step and mirror > _SAME_PLANE * step):
        return None
    return end <= _SAME_PLANE * step
