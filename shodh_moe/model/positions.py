"""3D axial rotary positions (DESIGN 3.4): the angle by which each token rotates each pair of features of a head.

Shapes: B samples, S tokens per sample (on this rank), W head width, P = W / 2 pairs of features, of which each axis
rotates a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.tensors import sent
from shodh_moe.parallel import ALONE, ContextParallel


def axial_rotary(grid: Sequence[int], head_width: int, base: float = 100.0) -> Tensor:
    """Return the rotation angle of each pair of features of each token, in radians, float64 [S, P].

    Rotary positions (RoFormer, arXiv 2104.09864) per axis: each axis rotates a third of the pairs, and the remaining
    pairs do not rotate. The base is small because a latent axis has at most a few dozen positions.

    Args:
        grid: numbers of tokens along x, y and z; tokens are ordered like the flattened grid, last axis fastest.
        head_width: W.
        base: ratio of the highest frequency to the limit of the lowest.
    """
    pairs = head_width // 2 // 3
    frequency = base ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    return _along_axes(grid, head_width, [frequency] * 3)


def periodic_rotary(grid: Sequence[int], head_width: int) -> Tensor:
    """As `axial_rotary`, for a box that is periodic along all axes: a shift by its size changes no angle.

    Along an axis of N tokens, pair j makes a whole number of turns, the one nearest to a turn for every 2, 4, 8, ...
    tokens. So wavelengths in tokens are nearly the same on every grid. Pairs with a longer wavelength than about 2 N do
    not rotate. At least one pair makes exactly one turn, so that no two tokens have the same position.
    """
    pairs = head_width // 2 // 3
    frequencies = []
    for size in grid:
        # Half a turn is rounded down, so that no pair makes more than N / 2 turns.
        turns = [math.ceil(size / 2 ** (pair + 1) - 0.5) for pair in range(pairs)]
        if 1 not in turns:
            turns[-1] = 1
        frequencies.append(torch.tensor(turns, dtype=torch.float64) * (2 * math.pi / size))
    return _along_axes(grid, head_width, frequencies)


def _along_axes(grid: Sequence[int], head_width: int, frequencies: list[Tensor]) -> Tensor:
    """Angles [S, P] for the frequencies, in radians per token, of the pairs that belong to each axis."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis, frequency in zip(axes, frequencies, strict=True)]
    rotated = sum(len(frequency) for frequency in frequencies)
    unrotated = torch.zeros(angles[0].shape[0], head_width // 2 - rotated, dtype=torch.float64)
    return torch.cat([*angles, unrotated], dim=1)


def token_angles(
    grid: tuple[int, int, int],
    head_width: int,
    device: torch.device,
    periodic_B3: Tensor | None = None,
    cp: ContextParallel = ALONE,
) -> Tensor:
    """Return the angles of all tokens, float64: [S, P] for all samples, or [B, 1, S, P] with ``periodic_B3``.

    Args:
        grid: numbers of tokens along x, y and z on this rank.
        head_width: W.
        periodic_B3: whether positions close on themselves along each axis of each sample, bool; None: along none.
        cp: which slab of each sample the tokens are; their positions are those in the whole sample.
    """
    whole = cp.whole(grid)
    open_SP = _table(axial_rotary, whole, head_width, device, cp.size, cp.rank)
    if periodic_B3 is None:
        return open_SP
    pairs = head_width // 2 // 3
    wraps_BP = F.pad(periodic_B3.repeat_interleave(pairs, dim=1), (0, head_width // 2 - 3 * pairs))
    closed_SP = _table(periodic_rotary, whole, head_width, device, cp.size, cp.rank)
    return torch.where(wraps_BP[:, None, None], closed_SP, open_SP)


@lru_cache(maxsize=32)
def _table(
    make: Callable[[Sequence[int], int], Tensor],
    grid: tuple[int, int, int],
    head_width: int,
    device: torch.device,
    slabs: int,
    slab: int,
) -> Tensor:
    """The angles of one slab. The result is cached, so callers must not write to it."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return sent(make(grid, head_width).chunk(slabs)[slab], device)
