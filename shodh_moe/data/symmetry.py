"""Symmetries of a flow in its box: each maps a solution to another solution of the same equations.

They are shifts along periodic axes and the cube's 48 symmetries, which are reflections, exchanges of axes, and their
combinations, such as rotations. A flow's walls and its driving force determine which of them it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shodh_moe.base.tensors import sent_numbers
from shodh_moe.data.reading import TrajectoryRecord

Axes = tuple[int, int, int]
Flags = tuple[bool, bool, bool]
# The order matters: random draws with a given seed depend on it.
_ORDERS: tuple[Axes, ...] = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 1, 2))


@dataclass(frozen=True)
class Symmetry:
    """A cyclic shift, then reflections, then a permutation of the axes.

    Attributes:
        shift: cyclic shift along x, y, z [cells].
        mirror: which axes are reversed.
        order: axis ``order[i]`` becomes axis ``i``.
    """

    shift: Axes = (0, 0, 0)
    mirror: Flags = (False, False, False)
    order: Axes = (0, 1, 2)

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: Axes, periodic: Flags, forced: bool = True) -> Symmetry:
        """Draw a random symmetry that keeps every wall in place and, if the flow is ``forced``, the direction x.

        Only periodic axes are shifted, mirrored or exchanged, and only axes of equal size are exchanged: a bed stays at
        the bottom and a lid at the top.
        """
        shift = [int(rng.integers(size)) if wraps else 0 for size, wraps in zip(grid, periodic, strict=True)]
        coins = rng.random(3)
        # Drawn last, and only without a force, so that the draws of forced flows do not depend on it.
        mirror_x = not forced and periodic[0] and bool(rng.random() < 0.5)
        orders = [order for order in _ORDERS if _may_exchange(order, grid, periodic, forced)]
        return cls(
            shift=(shift[0], shift[1], shift[2]),
            mirror=(mirror_x, bool(coins[0] < 0.5 and periodic[1]), bool(coins[1] < 0.5 and periodic[2])),
            order=orders[int(coins[2] * len(orders))],
        )

    @classmethod
    def draw_for(cls, rng: np.random.Generator, record: TrajectoryRecord, which: str = "all") -> Symmetry:
        """Draw a random symmetry of a trajectory. ``which``: only ``shifts``, only the ``cube``'s, or ``all``."""
        drawn = cls.draw(rng, record.grid, record.periodic, record.forced)
        return {"all": drawn, "shifts": cls(drawn.shift), "cube": cls(mirror=drawn.mirror, order=drawn.order)}[which]

    def apply(self, fields_B5XYZ: Tensor) -> Tensor:
        """Transform velocity (including its components), pressure and solid mask, [B, 5, X, Y, Z], on any device."""
        fields = torch.roll(fields_B5XYZ, self.shift, dims=(2, 3, 4)) if any(self.shift) else fields_B5XYZ
        if any(self.mirror):
            fields = fields.flip([2 + axis for axis in range(3) if self.mirror[axis]])
            sign = [-1.0 if turned else 1.0 for turned in self.mirror] + [1.0, 1.0]
            fields = fields * sent_numbers(sign, fields.device, fields.dtype)[:, None, None, None]
        if self.order != (0, 1, 2):
            fields = fields.permute(0, 1, *(2 + axis for axis in self.order))
            # A list as the index would be copied to the device, which the host would wait for.
            fields = torch.cat([fields[:, axis : axis + 1] for axis in (*self.order, 3, 4)], dim=1)
        return fields


def apply_each(symmetries: Sequence[Symmetry], fields_B5XYZ: Tensor) -> Tensor:
    """Apply its own symmetry to each sample of a batch [B, 5, X, Y, Z]."""
    return torch.cat([symmetry.apply(one[None]) for symmetry, one in zip(symmetries, fields_B5XYZ, strict=True)])


def draw_copies(seed: list[int], record: TrajectoryRecord, copies: int, which: str = "all") -> list[Symmetry]:
    """Return the identity and random symmetries of a trajectory, all different, at most ``copies`` in total.

    ``which`` as in `Symmetry.draw_for`; with ``cube`` they are drawn from `allowed`.
    """
    if which == "cube":
        others = [one for one in allowed(record.grid, record.periodic, record.forced) if one != Symmetry()]
        order = np.random.default_rng(seed).permutation(len(others))
        return [Symmetry(), *(others[number] for number in order[: copies - 1])]
    rngs = [np.random.default_rng([*seed, copy]) for copy in range(1, copies)]
    return list(dict.fromkeys([Symmetry(), *(Symmetry.draw_for(rng, record, which) for rng in rngs)]))


def allowed(grid: Axes, periodic: Flags, forced: bool = True) -> list[Symmetry]:
    """List all symmetries without a shift that `Symmetry.draw` can return: a group of 1 to 48 elements."""
    turnable = [axis for axis in range(3) if periodic[axis] and not (forced and axis == 0)]
    return [
        Symmetry(mirror=(0 in mirrored, 1 in mirrored, 2 in mirrored), order=order)
        for order in _ORDERS
        if _may_exchange(order, grid, periodic, forced)
        for count in range(len(turnable) + 1)
        for mirrored in itertools.combinations(turnable, count)
    ]


def _may_exchange(order: Axes, grid: Axes, periodic: Flags, forced: bool) -> bool:
    """Whether a permutation moves only periodic axes of equal size, and not the direction of the force."""
    moved = [(new, old) for new, old in enumerate(order) if new != old]
    return all(
        periodic[new] and periodic[old] and grid[new] == grid[old] and not (forced and new == 0) for new, old in moved
    )
