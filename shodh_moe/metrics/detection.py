"""How well a score tells two kinds of samples apart."""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(usual_N: Tensor, unusual_M: Tensor) -> float:
    """Probability that an unusual sample has a higher score than a usual one, ties counted half.

    This is the area under the curve of true over false positives of all limits.
    """
    both = torch.cat([usual_N, unusual_M]).double()
    _, place, count = both.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = (last - (count - 1) / 2)[place]  # from 1; the mean rank among equal scores
    n, m = len(usual_N), len(unusual_M)
    return float((rank[n:].sum() - m * (m + 1) / 2) / (n * m))
