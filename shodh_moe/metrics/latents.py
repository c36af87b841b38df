"""Mean squared errors of latents, sample by sample. Shapes: B samples, H history, C latent channels, x y z grid."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_mse(predicted_BCxyz: Tensor, target_BCxyz: Tensor) -> Tensor:
    """Mean squared error of each sample, [B]."""
    return (predicted_BCxyz - target_BCxyz).square().flatten(1).mean(1)


def mse_beside_persistence(predicted_BCxyz: Tensor, history_BHCxyz: Tensor, target_BCxyz: Tensor) -> Tensor:
    """Mean squared errors [B, 2] of the prediction and of persistence, which predicts the newest latent again."""
    persistence_B = sample_mse(history_BHCxyz[:, -1], target_BCxyz)
    return torch.stack([sample_mse(predicted_BCxyz, target_BCxyz), persistence_B], dim=1)
