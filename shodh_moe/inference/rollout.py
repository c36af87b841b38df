"""Predictions of a trajectory: one step from true latents, and free-running, each predicted latent fed back.

Shapes: B batch, H history, T snapshots, S tokens of a sample, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer import Tokenizer


def rollout(
    transformer: LatentTransformer, history_BHCxyz: Tensor, geometry_BCxyz: Tensor, expert_B: Tensor | None = None
) -> Iterator[Tensor]:
    """The next latents [B, C, x, y, z], one after the other and without end; ``expert_B`` for the oracle router."""
    while True:
        z_BCxyz = transformer(history_BHCxyz, geometry_BCxyz, expert_B).latent_BCxyz
        history_BHCxyz = torch.cat([history_BHCxyz[:, 1:], z_BCxyz[:, None]], dim=1)
        yield z_BCxyz


def predict_next(
    transformer: LatentTransformer, z_TCxyz: Tensor, geometry_Cxyz: Tensor, expert_1: Tensor, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """One-step predictions of a trajectory: of each latent from the H true ones before it.

    Args:
        expert_1: the trajectory's, for the oracle router.
        batch_size: windows of H latents at a time.

    Returns:
        the latents [T - H, C, x, y, z], and of each MoE layer the tokens' experts [T - H, S].
    """
    history = transformer.config.history
    windows = torch.stack([z_TCxyz[start : start + history] for start in range(len(z_TCxyz) - history)])
    latents, experts = [], []
    for window in windows.split(batch_size):
        geometry_BCxyz = geometry_Cxyz.expand(len(window), -1, -1, -1, -1)
        out = transformer(window, geometry_BCxyz, expert_1.expand(len(window)))
        latents.append(out.latent_BCxyz)
        experts.append([layer.expert_N.view(len(window), -1) for layer in out.routing])
    return torch.cat(latents), [torch.cat(parts) for parts in zip(*experts, strict=True)]


def decode(tokenizer: Tokenizer, z_BCxyz: Tensor, solid_1XYZ: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised latents of one geometry -> velocity and pressure at the centres [B, 4, X, Y, Z], in ``dtype``."""
    return decode_both(tokenizer, z_BCxyz, solid_1XYZ, dtype)[0]


def decode_both(
    tokenizer: Tokenizer, z_BCxyz: Tensor, solid_1XYZ: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """What `decode` gives, and the velocity whose divergence vanishes [B, 3, X, Y, Z]; see `Flow`."""
    flow = tokenizer.decode(z_BCxyz, solid_1XYZ.expand(len(z_BCxyz), -1, -1, -1, -1), dtype)
    return torch.cat([flow.velocity_B3XYZ, flow.pressure_B1XYZ.to(dtype)], dim=1), flow.conserved_B3XYZ
