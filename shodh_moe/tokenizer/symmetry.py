"""Symmetries of a flow in its box: each maps a solution to another solution of the same equations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Symmetry:
    """A shift [cells] along x, y, z, then mirror images across y and z, then the exchange of y and z."""

    shift: tuple[int, int, int] = (0, 0, 0)
    mirror_y: bool = False
    mirror_z: bool = False
    swap_yz: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: tuple[int, int, int], periodic: tuple[bool, bool, bool]) -> Symmetry:
        """A random symmetry that keeps the streamwise (x) direction and every boundary where it is.

        Only periodic axes are shifted, mirrored or exchanged: a bed stays at the bottom.
        """
        shift = tuple(int(rng.integers(size)) if wraps else 0 for size, wraps in zip(grid, periodic, strict=True))
        coins = rng.random(3) < 0.5
        return cls(
            shift=(shift[0], shift[1], shift[2]),
            mirror_y=bool(coins[0] and periodic[1]),
            mirror_z=bool(coins[1] and periodic[2]),
            swap_yz=bool(coins[2] and periodic[1] and periodic[2] and grid[1] == grid[2]),
        )

    def apply(self, fields_B5XYZ: Tensor) -> Tensor:
        """Transform velocity (components turned along), pressure and solid mask, [B, 5, X, Y, Z]."""
        fields = torch.roll(fields_B5XYZ, self.shift, dims=(2, 3, 4))
        sign = torch.ones(5, device=fields.device)
        for mirror, component, axis in ((self.mirror_y, 1, 3), (self.mirror_z, 2, 4)):
            if mirror:
                fields, sign[component] = fields.flip(axis), -1
        fields = fields * sign[:, None, None, None]
        return fields.transpose(3, 4)[:, [0, 2, 1, 3, 4]] if self.swap_yz else fields
