"""Windows of held-out latents, and the errors of their one-step predictions. Shapes: D domains."""

from __future__ import annotations

import torch

from shodh_moe.inference.one_step import predict_windows
from shodh_moe.metrics.latents import mse_beside_persistence
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples


def all_windows(samples: LatentSamples, count: int | None = None) -> list[tuple[int, int]]:
    """List (domain, index) of every window, or of ``count`` evenly spread windows per domain (all, if it has fewer)."""
    used = [size if count is None else min(count, size) for size in samples.sizes]
    return [
        (domain, n * size // use)
        for domain, (size, use) in enumerate(zip(samples.sizes, used, strict=True))
        for n in range(use)
    ]


def latent_errors(
    transformer: LatentTransformer,
    samples: LatentSamples,
    batch_size: int,
    windows: list[tuple[int, int]] | None = None,
) -> dict[str, dict[str, float]]:
    """One-step errors by domain: ``{domain: {"latent_mse", "latent_mse_persistence"}}``.

    They are unweighted means over ``windows``, a list of (domain, index); None uses all. Domains without a window are
    left out.
    """
    windows = all_windows(samples) if windows is None else windows
    totals_D2 = torch.zeros(len(samples.domains), 2, dtype=torch.float64)
    for found in predict_windows(transformer, samples, windows, batch_size):
        batch = found.batch
        errors_B2 = mse_beside_persistence(found.latent_BCxyz, batch.history_BHCxyz, batch.target_BCxyz)
        totals_D2.index_add_(0, batch.domain_B, errors_B2.double())
    counts_D = torch.bincount(torch.tensor([domain for domain, _ in windows]), minlength=len(samples.domains))
    means = (totals_D2 / counts_D[:, None]).tolist()
    return {
        domain: {"latent_mse": row[0], "latent_mse_persistence": row[1]}
        for domain, row, count in zip(samples.domains, means, counts_D.tolist(), strict=True)
        if count
    }
