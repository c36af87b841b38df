"""One-step predictions of known latents, window by window: H true latents in, the next one out.

No token is dropped, so the prediction of a window does not depend on the other windows in its batch.
Shapes: B windows of a batch, T snapshots, S tokens of a window, C latent channels, x y z latent grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.model import LatentTransformer, Routing
from shodh_moe.tokenizer.latents import Batch, LatentSamples, LatentTrajectory


class Predicted(NamedTuple):
    """A batch of windows and their predictions.

    Attributes:
        windows: (domain, index) of each, as in `LatentSamples.index`.
        batch: the windows' latents, on the CPU.
        latent_BCxyz: the predictions, on the CPU.
        routing: routing of every MoE layer, with the tokens window by window, on the transformer's device.
    """

    windows: list[tuple[int, int]]
    batch: Batch
    latent_BCxyz: Tensor
    routing: list[Routing]


@torch.no_grad()
def predict_windows(
    transformer: LatentTransformer, samples: LatentSamples, windows: list[tuple[int, int]], batch_size: int
) -> Iterator[Predicted]:
    """Predict windows in their order, ``batch_size`` at a time.

    Raises:
        ValueError: the transformer is in training mode, in which it may drop tokens.
    """
    if transformer.training:
        raise ValueError("the transformer is in training mode: call eval() first, or tokens may be dropped")
    device = next(transformer.parameters()).device
    for first in range(0, len(windows), batch_size):
        chosen = windows[first : first + batch_size]
        batch = samples.batch(chosen)
        prediction = transformer(*batch.to(device).inputs)
        yield Predicted(chosen, batch, prediction.latent_BCxyz.cpu(), prediction.routing)


def predict_trajectory(
    transformer: LatentTransformer, samples: LatentSamples, trajectory: LatentTrajectory, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """Predict each latent of a trajectory from the H true ones before it.

    Args:
        samples: samples that include those of the trajectory.

    Returns:
        the latents [T - H, C, x, y, z] on the CPU, and for each MoE layer the tokens' experts [T - H, S].
    """
    windows = samples.windows_of(trajectory)
    latents, experts = [], []
    for found in predict_windows(transformer, samples, windows, batch_size):
        latents.append(found.latent_BCxyz)
        experts.append([layer.expert_N.view(len(found.windows), -1) for layer in found.routing])
    return torch.cat(latents), [torch.cat(parts) for parts in zip(*experts, strict=True)]
