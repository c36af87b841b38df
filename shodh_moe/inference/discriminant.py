"""Linear discriminants of contexts with one shrunken covariance for all domains (Fisher; Ledoit and Wolf).

Shapes: M rows, F numbers of a row, D domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError

SHRINKAGE = 0.5  # share of the identity in the covariance; docs/finetune.md


@dataclass(frozen=True)
class Discriminant:
    """Domain means, and the transform that makes the covariance within domains the identity; float64.

    Attributes:
        mean_DF: means of the domains.
        whiten_FF: (x - mean) @ whiten has unit covariance within domains.
    """

    mean_DF: Tensor
    whiten_FF: Tensor

    def distances(self, rows_MF: Tensor) -> Tensor:
        """Mean squared Mahalanobis distance per number from each domain's mean, [M, D]."""
        points_MF, means_DF = rows_MF.double() @ self.whiten_FF, self.mean_DF @ self.whiten_FF
        return (
            torch.cdist(points_MF, means_DF, compute_mode="donot_use_mm_for_euclid_dist").square() / points_MF.shape[1]
        )

    def scores(self) -> Tensor:
        """w_d and b_d, [D, F + 1]: the domain with the largest <w_d, x> + b_d is the nearest one."""
        means_DF = self.mean_DF @ self.whiten_FF
        return torch.cat([means_DF @ self.whiten_FF.T, -0.5 * means_DF.square().sum(1, keepdim=True)], dim=1)


def fit(rows_MF: Tensor, domain_M: Tensor, domains: int) -> Discriminant:
    """Fit means and covariance; each domain counts alike in the covariance.

    Raises:
        UserError: the rows of a domain are all equal.
    """
    rows_MF = rows_MF.double()
    by_domain = [rows_MF[domain_M == domain] for domain in range(domains)]
    mean_DF = torch.stack([rows.mean(0) for rows in by_domain])
    covariance_FF = (
        sum((rows - mean).T @ (rows - mean) / len(rows) for rows, mean in zip(by_domain, mean_DF, strict=True))
        / domains
    )
    assert isinstance(covariance_FF, Tensor)
    scale = covariance_FF.diagonal().mean()
    if not scale > 0:
        raise UserError("the contexts of a domain are all equal: give trajectories whose snapshots differ")
    eye_FF = torch.eye(len(covariance_FF), dtype=torch.float64)
    covariance_FF = (1 - SHRINKAGE) * covariance_FF + SHRINKAGE * scale * eye_FF
    lower_FF = torch.linalg.cholesky(covariance_FF)
    return Discriminant(mean_DF, torch.linalg.solve_triangular(lower_FF, eye_FF, upper=False).T)
