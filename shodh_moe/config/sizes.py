"""The grids that a model takes: any whose sizes are multiples of what it cannot divide."""

from __future__ import annotations

from collections.abc import Sequence

from shodh_moe.base.divisors import nearest_divisor
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


def require_slabs(latent_grid: Sequence[int], model: ModelConfig, slabs: int) -> None:
    """Check that latents can be cut along their first axis into slabs of equal size, without cutting tokens or windows.

    Args:
        latent_grid: a grid that a model takes (`require_size`), in latents.
        slabs: ``parallel.context_size``.

    Raises:
        UserError: they cannot; names the nearest number of slabs that is possible.
    """
    tokens, window = latent_grid[0] // model.patch, token_window(model.moe)
    if slabs == 1 or not tokens % (slabs * window):
        return
    if tokens % slabs:
        wrong = f"does not divide the {tokens} tokens along the first axis of the latent grid"
    else:
        wrong = f"cuts windows of {window} tokens (model.moe.router.window)"
    nearest = nearest_divisor(slabs, max(tokens // window, 1))
    raise UserError(f"parallel.context_size {slabs} {wrong}: set it to {nearest}")
