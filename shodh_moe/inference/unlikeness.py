"""How unlike a model's training data an input is, from the contexts that the model records.

Shapes: M contexts, B samples, I inputs of a token's embedding, F numbers of a context, D domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shodh_moe.inference.contexts import Contexts
from shodh_moe.inference.discriminant import Discriminant, fit

QUANTILE = 0.99  # share of the validation samples that are within the limits


@dataclass(frozen=True)
class Unlikeness:
    """Distances from the training domains, relative to limits that 99 % of the validation samples keep.

    There are two: the Mahalanobis distance of a sample's statistics divided by their RMS, and the distance of the
    RMS's logarithm from a domain's mean in standard deviations, so that a flow of a known shape at another speed is
    noticed too.

    Attributes:
        shape: means and covariance of the statistics divided by their RMS.
        size_D2: mean and standard deviation of the RMS's logarithm in each domain, float64.
        limits: of both distances.
    """

    domains: list[str]
    inputs: int
    shape: Discriminant
    size_D2: Tensor
    limits: Tensor

    def score(self, rows_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each sample the larger of both distances over its limit, float64 [B], and the nearest domain [B].

        Above 1 a sample is unlike all domains.
        """
        distances_B2, nearest_B = _distances(self, rows_BF)
        return (distances_B2 / self.limits).amax(1), nearest_B


def fit_unlikeness(contexts: Contexts) -> Unlikeness:
    """Fit the statistics to the training contexts, and the limits to the validation contexts."""
    train_M, valid_M = ~contexts.valid_M, contexts.valid_M if contexts.valid_M.any() else ~contexts.valid_M
    shape_MF, size_M = _parts(contexts.rows_MF, contexts.inputs)
    domains = len(contexts.domains)
    shape = fit(shape_MF[train_M], contexts.domain_M[train_M], domains)
    by_domain = [size_M[train_M & (contexts.domain_M == domain)] for domain in range(domains)]
    sizes = torch.stack([torch.stack([one.mean(), one.std(correction=0).clamp(min=1e-3)]) for one in by_domain])
    made = Unlikeness(contexts.domains, contexts.inputs, shape, sizes, torch.ones(2, dtype=torch.float64))
    distances_M2, _ = _distances(made, contexts.rows_MF[valid_M])
    limits = distances_M2.quantile(QUANTILE, dim=0).clamp(min=1e-12)
    return Unlikeness(contexts.domains, contexts.inputs, shape, sizes, limits)


def _distances(fitted: Unlikeness, rows_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Both distances from the nearest domain, [B, 2], and the domain that is nearest in shape."""
    shape_BF, size_B = _parts(rows_BF, fitted.inputs)
    shape_B, nearest_B = fitted.shape.distances(shape_BF).min(1)
    mean_D, std_D = fitted.size_D2.unbind(1)
    size_B = ((size_B[:, None] - mean_D) / std_D).abs().amin(1)
    return torch.stack([shape_B, size_B], dim=1), nearest_B


def _parts(rows_MF: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """The statistics over the RMS of those of the inputs, and its logarithm; float64."""
    rows_MF = rows_MF.double()
    rms_M1 = rows_MF[:, : 2 * inputs].square().mean(1, keepdim=True).add(1e-6).sqrt()
    return rows_MF / rms_M1, rms_M1.log()[:, 0]
