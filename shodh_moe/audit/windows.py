"""One-step predictions of held-out latents, window by window: H true latents in, the next one out.

No token is dropped, so a window's prediction does not depend on what else is in its batch.
Shapes: B windows of a batch, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.model import LatentTransformer
from shodh_moe.model.moe import Routing
from shodh_moe.tokenizer.latents import LatentSamples


class Predicted(NamedTuple):
    """A batch of windows.

    Attributes:
        windows: (domain, index) of each, as in `LatentSamples.index`.
        domain_B: int64 [B].
        error_B: mean square error of the normalised latent [B].
        persistence_B: that of the window's newest latent in place of a prediction [B].
        routing: of every MoE layer, the tokens window by window.
    """

    windows: list[tuple[int, int]]
    domain_B: Tensor
    error_B: Tensor
    persistence_B: Tensor
    routing: list[Routing]


def all_windows(samples: LatentSamples, count: int | None = None) -> list[tuple[int, int]]:
    """(domain, index) of every window, or of ``count`` in each domain, spread evenly over it (all, if it has fewer)."""
    used = [size if count is None else min(count, size) for size in samples.sizes]
    return [
        (domain, n * size // use)
        for domain, (size, use) in enumerate(zip(samples.sizes, used, strict=True))
        for n in range(use)
    ]


@torch.no_grad()
def predict(
    transformer: LatentTransformer, samples: LatentSamples, windows: list[tuple[int, int]], batch_size: int
) -> Iterator[Predicted]:
    """The windows in their order, ``batch_size`` at a time; everything returned is on the CPU but the routing.

    Raises:
        ValueError: the transformer is in training mode, in which it may drop tokens.
    """
    if transformer.training:
        raise ValueError("the transformer is in training mode: call eval() first, or tokens may be dropped")
    device = next(transformer.parameters()).device
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        history, geometry, target, domain_B = samples.batch(batch)
        expert_B = samples.expert_B(domain_B, transformer.config.moe.num_experts)
        out = transformer(history.to(device), geometry.to(device), expert_B.to(device))
        error_B = (out.latent_BCxyz.cpu() - target).square().flatten(1).mean(1)
        persistence_B = (history[:, -1] - target).square().flatten(1).mean(1)
        yield Predicted(batch, domain_B, error_B, persistence_B, out.routing)


def latent_errors(
    transformer: LatentTransformer,
    samples: LatentSamples,
    batch_size: int,
    windows: list[tuple[int, int]] | None = None,
) -> dict[str, dict[str, float]]:
    """``{domain: {"latent_mse", "latent_mse_persistence"}}``, means over ``windows`` (None: all), each with the same
    weight; a domain without a window is left out.
    """
    windows = all_windows(samples) if windows is None else windows
    totals_D2 = torch.zeros(len(samples.domains), 2, dtype=torch.float64)
    for batch in predict(transformer, samples, windows, batch_size):
        totals_D2.index_add_(0, batch.domain_B, torch.stack([batch.error_B, batch.persistence_B], dim=1).double())
    counts_D = torch.bincount(torch.tensor([domain for domain, _ in windows]), minlength=len(samples.domains))
    means = (totals_D2 / counts_D[:, None]).tolist()
    return {
        domain: {"latent_mse": row[0], "latent_mse_persistence": row[1]}
        for domain, row, count in zip(samples.domains, means, counts_D.tolist(), strict=True)
        if count
    }
