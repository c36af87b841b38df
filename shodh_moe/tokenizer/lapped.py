"""Blocks of 8 cells that overlap: an orthogonal change of variables before a transform of separate blocks.

Along each axis the 4 cells on either side of a block's border are rotated, pair by pair, so that a separate block of
the result depends on 16 cells of the field, and a step at a border of blocks becomes a smooth transition. A transform
of separate blocks after `overlap` is thus a lapped orthogonal transform with windows of 16 cells, whose shifted squares
sum to one (Malvar, Signal Processing with Lapped Transforms, 1992). The rotation is that of local cosine bases (Coifman
and Meyer 1991), with the window of Vorbis I. The field is periodic, as the box of the tokenizer is.

Shapes: B batch, C channels, X Y Z space, each a multiple of 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shodh_moe.config import COMPRESSION


def overlap(x_BCXYZ: Tensor) -> Tensor:
    """Rotate the cells around the borders of blocks; the shape stays, and sums of squares too."""
    return _turn(x_BCXYZ, rotation(x_BCXYZ))


def separate(x_BCXYZ: Tensor) -> Tensor:
    """Undo `overlap`, of which this is also the transpose."""
    return _turn(x_BCXYZ, rotation(x_BCXYZ).T)


def rotation(like: Tensor) -> Tensor:
    """The orthogonal matrix [8, 8] that acts on the cells around a border, 4 before it and 4 after it.

    Cells at the distance d = 1/2, 3/2, 5/2, 7/2 from the border form pairs, which turn by
    pi/2 cos^2(pi/4 (1 + d/4)): by pi/4 at the border, and not at all at the distance 4.
    """
    half = COMPRESSION // 2
    distance = torch.arange(half, dtype=torch.float64) + 0.5
    angle = math.pi / 2 * (math.pi / 4 * (1 + distance / half)).cos() ** 2
    cosine, sine = torch.cat([angle.flip(0), angle]).cos(), torch.cat([-angle.flip(0), angle]).sin()
    return (torch.diag(cosine) + torch.diag(sine).flip(1)).to(like)


def _turn(x_BCXYZ: Tensor, matrix: Tensor) -> Tensor:
    half = COMPRESSION // 2
    for axis in (2, 3, 4):
        # After the shift, a border is in the middle of each group of 8 cells.
        groups = x_BCXYZ.roll(-half, axis).movedim(axis, -1).unflatten(-1, (-1, COMPRESSION))
        x_BCXYZ = (groups @ matrix.T).flatten(-2).movedim(-1, axis).roll(half, axis)
    return x_BCXYZ
