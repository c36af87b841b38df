"""Initialise a tokenizer with principal components of the patches of its training data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from shodh_moe.config import COMPRESSION
from shodh_moe.data.loader import Snapshots
from shodh_moe.data.symmetry import Symmetry
from shodh_moe.tokenizer.autoencoder import space_to_depth
from shodh_moe.tokenizer.batches import drawn_batches
from shodh_moe.tokenizer.lapped import overlap
from shodh_moe.tokenizer.tokenizer import Tokenizer

SAMPLES = 512  # maximum number of snapshots whose patches are analysed
# Names in the tokenizer's state: the scales of the fields, which must be set first, and what the initialisation sets.
SCALES = ("velocity_rms", "pressure_rms")
STARTED = ("encoder.project.weight", "decoder.patches.weight", "geometry_mean_P", "geometry_basis_CP")


@torch.no_grad()
def start_from_principal_components(
    tokenizer: Tokenizer,
    train: Snapshots,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    reduce: Callable[[Tensor], object] = lambda sums: None,
) -> None:
    """Set the linear parts of encoder and decoder, and the basis of the geometry latent, from training patches.

    The principal components are not centred, so that a field at rest has the latent zero. They are computed from at
    most `SAMPLES` randomly shifted snapshots, which are divided among the ranks.

    Args:
        train: the snapshots of the training split.
        seed: selects the snapshots and their symmetries; equal on all ranks.
        rank, ranks: this rank and the number of ranks.
        reduce: replaces a float64 tensor on the tokenizer's device by its sum over all ranks, in place.
    """
    rng = np.random.default_rng([seed, 0x7C4])
    channels, patch = tokenizer.config.latent_channels, COMPRESSION**3
    device = tokenizer.velocity_rms.device
    flow, solid = (torch.zeros(size, size, dtype=torch.float64, device=device) for size in (4 * patch, patch))
    mean, count = torch.zeros(patch, dtype=torch.float64, device=device), flow.new_zeros(())
    picks = [int(i) for i in rng.permutation(len(train))[:SAMPLES]]
    draws = [([pick], [Symmetry.draw_for(rng, train.record(pick))]) for pick in picks]
    for _, fields in drawn_batches(train, draws[rank::ranks], device):
        normal = tokenizer.normalise(fields)
        if tokenizer.config.patches == "overlapping":
            normal = torch.cat([overlap(normal[:, :4]), normal[:, 4:]], dim=1)
        x = space_to_depth(normal, COMPRESSION)[0].flatten(1).T
        flow += x[:, : 4 * patch].T @ x[:, : 4 * patch]
        solid += x[:, 4 * patch :].T @ x[:, 4 * patch :]
        mean += x[:, 4 * patch :].double().sum(0)
        count += len(x)
    for sums in (flow, solid, mean, count):
        reduce(sums)
    flow, solid, mean = (sums.cpu() / count.cpu() for sums in (flow, solid, mean))
    basis = _leading(flow, len(tokenizer.encoder.project.weight))[0]
    tokenizer.encoder.project.weight.copy_(basis.view(-1, 4, *[COMPRESSION] * 3))
    tokenizer.decoder.patches.weight.copy_(basis.view(-1, 4, *[COMPRESSION] * 3))
    vectors, values = _leading(solid - torch.outer(mean, mean), channels)
    present = values > 1e-6 * values[0].clamp(min=1.0)  # smaller ones are rounding errors: the mask is 0 or 1
    scaled = torch.where(present[:, None], vectors / values.clamp(min=1e-12).sqrt()[:, None], 0.0)
    tokenizer.geometry_mean_P.copy_(mean)
    tokenizer.geometry_basis_CP[: len(scaled)].copy_(scaled)


def _leading(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` leading eigenvectors as rows, with positive largest entries, and their eigenvalues."""
    size = len(covariance)
    # Several times faster than torch.linalg.eigh, which computes all eigenvectors.
    values, vectors = scipy.linalg.eigh(covariance.numpy(), subset_by_index=[max(size - count, 0), size - 1])
    rows = torch.from_numpy(vectors.T[::-1].copy())
    sign = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    return rows * sign, torch.from_numpy(values[::-1].copy()).clamp(min=0)
