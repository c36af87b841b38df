"""Free-running predictions, which feed each predicted latent back, and decoding of latents.

Shapes: B batch, H history, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.rollout import predictions
from shodh_moe.tokenizer import Tokenizer


def rollout(
    transformer: LatentTransformer, history_BHCxyz: Tensor, geometry_BCxyz: Tensor, context: Context | None = None
) -> Iterator[Tensor]:
    """Yield the next latents [B, C, x, y, z], one after the other, without end; see `predictions`."""
    for prediction in predictions(transformer, history_BHCxyz, geometry_BCxyz, context):
        yield prediction.latent_BCxyz


def decode(tokenizer: Tokenizer, z_BCxyz: Tensor, solid_1XYZ: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Decode normalised latents of one geometry to cell-centred velocity and pressure [B, 4, X, Y, Z] in ``dtype``."""
    return decode_both(tokenizer, z_BCxyz, solid_1XYZ, dtype)[0]


def decode_both(
    tokenizer: Tokenizer, z_BCxyz: Tensor, solid_1XYZ: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """As `decode`, with the divergence-free velocity [B, 3, X, Y, Z] as a second result; see `Flow`.

    The geometries may also differ: ``solid_1XYZ`` [B, 1, X, Y, Z].
    """
    flow = tokenizer.decode(z_BCxyz, solid_1XYZ.expand(len(z_BCxyz), 1, *solid_1XYZ.shape[-3:]), dtype)
    return torch.cat([flow.velocity_B3XYZ, flow.pressure_B1XYZ.to(dtype)], dim=1), flow.conserved_B3XYZ
