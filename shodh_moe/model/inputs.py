"""Inputs of the latent transformer's embedding: latents as tokens, and a sample's own scale.

Shapes: B batch, H history, C latent channels, x y z latent grid (of this rank's slab), S tokens per sample (on this
rank).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig
from shodh_moe.parallel import ALONE, ContextParallel

TokenGrid = tuple[int, int, int]
LEAST_SCALE = 1e-6  # of a history, so that one without any flow can be divided by it


def embedding_inputs(
    history_BHCxyz: Tensor, geometry_BCxyz: Tensor, config: ModelConfig, cp: ContextParallel = ALONE
) -> Tensor:
    """Return the tokens before the embedding, [B, S, (H + 1) C patch^3].

    With ``model.scale_history`` the history is divided by `history_scale`; the geometry is not.
    """
    if config.scale_history:
        history_BHCxyz = history_BHCxyz / history_scale(history_BHCxyz, cp)[:, None]
    return patchify(torch.cat([history_BHCxyz.flatten(1, 2), geometry_BCxyz], dim=1), config.patch)


def history_scale(history_BHCxyz: Tensor, cp: ContextParallel = ALONE) -> Tensor:
    """`history_rms`, but no less than `LEAST_SCALE`, [B, 1, 1, 1, 1]."""
    return history_rms(history_BHCxyz, cp).clamp(min=LEAST_SCALE)[:, None, None, None, None]


def history_rms(history_BHCxyz: Tensor, cp: ContextParallel = ALONE) -> Tensor:
    """Root mean square of each sample's history over all its snapshots, channels and cells, in all slabs, [B]."""
    return cp.mean(history_BHCxyz.square().flatten(1).mean(1)).sqrt()


def token_grid(latent_BCxyz: Tensor, patch: int) -> TokenGrid:
    """Return the numbers of tokens along x, y and z of latents.

    Raises:
        UserError: ``model.patch`` does not divide the grid.
    """
    nx, ny, nz = latent_BCxyz.shape[-3:]
    if nx % patch or ny % patch or nz % patch:
        raise UserError(f"latent grid {[nx, ny, nz]} is not divisible by model.patch {patch}: choose another grid")
    return nx // patch, ny // patch, nz // patch


def patchify(x_BCxyz: Tensor, patch: int) -> Tensor:
    """Turn cubes of ``patch``^3 latents into tokens [B, S, C patch^3], last grid axis fastest."""
    b, c, nx, ny, nz = x_BCxyz.shape
    p = patch
    x = x_BCxyz.reshape(b, c, nx // p, p, ny // p, p, nz // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, (nx // p) * (ny // p) * (nz // p), c * p**3)


def unpatchify(x_BSC: Tensor, patch: int, shape: torch.Size) -> Tensor:
    """Inverse of `patchify`; ``shape`` is that of the latents, [B, C, x, y, z]."""
    b, c, nx, ny, nz = shape
    p = patch
    x = x_BSC.view(b, nx // p, ny // p, nz // p, c, p, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)
