"""The grids that a model takes: any whose sizes are multiples of what it cannot divide."""

from __future__ import annotations

from collections.abc import Sequence

from shodh_moe.base.errors import UserError
from shodh_moe.config.model import ModelConfig, MoEConfig
from shodh_moe.config.tokenizer import COMPRESSION


def size_step(model: ModelConfig) -> int:
    """Number of cells that each size of a grid has to be a multiple of: one latent, patch and window along an axis."""
    return COMPRESSION * model.patch * token_window(model.moe)


def token_window(moe: MoEConfig) -> int:
    """Tokens along an axis that are routed together; 1 if the router uses no windows."""
    used = moe.num_experts and moe.scope == "path" and moe.router.context == "window"
    return moe.router.window if used else 1


def misfit(grid: Sequence[int], step: int) -> str | None:
    """Say that a grid is not a multiple of ``step`` along each axis, and which grids near it are; None if it is one."""
    if all(size % step == 0 for size in grid):
        return None
    smaller, larger = [size // step * step for size in grid], [-(-size // step) * step for size in grid]
    nearest = f"{smaller} and {larger}" if all(smaller) else f"{larger}"
    return f"not a multiple of {step} along each axis: the nearest sizes are {nearest}"


def require_size(grid: Sequence[int], model: ModelConfig, where: str) -> None:
    """Check that a model takes a grid.

    Args:
        where: the beginning of the message, which ends in what has the grid.

    Raises:
        UserError: a size is not a multiple of `size_step`; names the nearest ones that are.
    """
    if found := misfit(grid, size_step(model)):
        parts = [f"the tokenizer's compression {COMPRESSION}"]
        parts += [f"model.patch {model.patch}"] if model.patch > 1 else []
        parts += [f"model.moe.router.window {token_window(model.moe)}"] if token_window(model.moe) > 1 else []
        raise UserError(f"{where} {list(grid)}, {found} (from {' times '.join(parts)}); crop, pad or resample to one")
