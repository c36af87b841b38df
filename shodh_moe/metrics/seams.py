"""Seams: traces of a decoder's blocks in its error.

Shapes: an error is ``[..., C, X, Y, Z]``, C components of one field; leading axes are kept. Blocks begin at cell 0 of
each axis, and the box is periodic. Everything is computed in float64.

The two measures complement each other. Steps whose heights differ at random from block to block have no power of their
own at the blocks' wave numbers, where the transform of a block vanishes, and only `face_jumps` shows them. A pattern
that is the same in each block has all its power there, with or without steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPACE = (-3, -2, -1)


def face_jumps(error: Tensor, block: int = 8) -> Tensor:
    """Mean squared jump of the error between neighbouring cells, across faces of blocks and across all other faces.

    Returns [..., 2, 3]: the two means, for jumps along x, y and z. Means of several errors may be averaged before their
    ratio is taken, which is 1 for an error without steps at the faces of blocks. (Yim and Bovik compare the same means,
    IEEE Transactions on Image Processing 20, 88, 2011.)

    Raises:
        ValueError: an axis is not a multiple of ``block``.
    """
    found = []
    for axis in SPACE:
        _require_blocks(error.shape[axis], block)
        squares = (error.double() - error.double().roll(1, axis)).square()
        others = tuple(dim for dim in (-4, *SPACE) if dim != axis)
        # Entry i is the jump between the cells i - 1 and i of a block.
        jump_I = squares.mean(others).unflatten(-1, (-1, block)).mean(-2)
        found.append(torch.stack([jump_I[..., 0], jump_I[..., 1:].mean(-1)], dim=-1))
    return torch.stack(found, dim=-1)


def block_power(error: Tensor, block: int = 8) -> Tensor:
    """Power of the error at the blocks' wave numbers, and mean power at their neighbours, along each axis.

    The blocks' wave numbers along an axis of N cells are the multiples of N / block, up to N / 2; their neighbours are
    one wave more and one less. The power is that of Fourier transforms along the axis alone, summed over components and
    averaged over the lines of cells.

    Returns [..., 2, 3]: the two powers, summed over the blocks' wave numbers, for waves along x, y and z. Powers of
    several errors may be averaged before their ratio is taken. The ratio of a smooth spectrum is about 1. An axis with
    a single block, whose wave numbers are all wave numbers, has NaN.

    Raises:
        ValueError: an axis is not a multiple of ``block``.
    """
    found = []
    for axis in SPACE:
        cells = error.shape[axis]
        _require_blocks(cells, block)
        spectrum = torch.fft.rfft(error.double(), dim=axis).abs().div(cells).square()
        power_K = spectrum.sum(-4).mean(tuple(dim for dim in SPACE if dim != axis))
        own = list(range(cells // block, cells // 2 + 1, cells // block))
        if cells == block:
            found.append(torch.full_like(power_K[..., :2], torch.nan))
            continue
        beside = [[k for k in (wave - 1, wave + 1) if k <= cells // 2] for wave in own]
        means = torch.stack([power_K[..., waves].mean(-1) for waves in beside], dim=-1)
        found.append(torch.stack([power_K[..., own].sum(-1), means.sum(-1)], dim=-1))
    return torch.stack(found, dim=-1)


def _require_blocks(cells: int, block: int) -> None:
    if cells % block:
        raise ValueError(f"an axis of {cells} cells does not consist of blocks of {block}")
