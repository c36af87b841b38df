"""Average predictions over shifts of the flow relative to the tokenizer's patches.

A flow shifted along a periodic axis is the same flow, but its patches' borders lie elsewhere. The mean of predictions,
each shifted back, has seams at no border in particular, and less of the error that depends on where the borders are.
A mean of velocities without divergence has none, and remains zero in solids. (Walrus, arXiv 2511.15684, shifts its
patches at random in each step of a rollout for the same reason.)

Shapes: H given snapshots, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shodh_moe.base.boundaries import Boundaries
from shodh_moe.base.errors import UserError
from shodh_moe.config import COMPRESSION
from shodh_moe.inference.model import Model

Shift = tuple[int, int, int]


def patch_shifts(count: int, periodic: tuple[bool, bool, bool]) -> list[Shift]:
    """Return ``count`` different shifts by 0 to 7 cells along periodic axes, the first of them no shift.

    They are evenly spread: points of a Sobol sequence, 8 of which have 8 different shifts along every axis.

    Raises:
        UserError: ``count`` is not from 1 to 1, 8 or 64, with no, one, or two or more periodic axes.
    """
    axes = [axis for axis in range(3) if periodic[axis]]
    most = COMPRESSION ** min(len(axes), 2)
    if not 1 <= count <= most:
        along = f"periodic along {', '.join('xyz'[axis] for axis in axes)}" if axes else "not periodic along any axis"
        raise UserError(f"--average {count}: the flow is {along}: give a number from 1 to {most}")
    if count == 1:
        return [(0, 0, 0)]
    points = torch.quasirandom.SobolEngine(len(axes)).draw(count)
    shifts = torch.zeros(count, 3, dtype=torch.int64)
    shifts[:, axes] = (points * COMPRESSION).long()
    return [(x, y, z) for x, y, z in shifts.tolist()]


def continue_shifted(
    model: Model,
    fields_H4XYZ: Tensor,
    solid_1XYZ: Tensor,
    stride: int,
    boundaries: Boundaries,
    shifts: list[Shift],
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `Model.continue_flow`, both fields averaged over predictions of the flow under each shift."""
    axes = (-3, -2, -1)
    flows = [
        model.continue_flow(fields_H4XYZ.roll(one, axes), solid_1XYZ.roll(one, axes), stride, boundaries)
        for one in shifts
    ]
    for found in zip(*flows, strict=True):
        back = [
            [x.roll([-cells for cells in one], axes) for x in pair] for pair, one in zip(found, shifts, strict=True)
        ]
        exact_4XYZ, conserved_3XYZ = (torch.stack(parts).mean(0) for parts in zip(*back, strict=True))
        yield exact_4XYZ, conserved_3XYZ
