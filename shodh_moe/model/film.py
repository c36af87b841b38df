"""FiLM, a control experiment: a network that is told what a path router sees, but has no paths.

Shapes: B samples, S tokens per sample, N = B S tokens, M rows of F features, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.model.inputs import TokenGrid
from shodh_moe.model.path import Features

HIDDEN = 64


class Film(nn.Module):
    """Feature-wise linear modulation (Perez et al., arXiv 1709.07871): x -> (1 + g(c)) x + b(c).

    g and b are a small network of the features c that a path router would see. It modulates the output of the embedding
    and the input of the head, the parts that each path has for itself. Before training it changes nothing.

    Args:
        features: computes c.
        dim: D.
    """

    def __init__(self, features: Features, dim: int):
        super().__init__()
        self.features = features
        self.hidden = nn.Linear(features.width, HIDDEN)
        self.out = nn.Linear(HIDDEN, 4 * dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_BSI: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Return scale and shift, [B, S, 2 D], for the embedding's output and for the head's input."""
        x_MF, row_N = self.features(z_BSI, grid)
        film_M = self.out(F.silu(self.hidden(x_MF.to(z_BSI.dtype))))
        film_N = film_M if row_N is None else film_M.index_select(0, row_N)
        first, last = film_N.view(*z_BSI.shape[:2], -1).chunk(2, dim=2)
        return first, last


def modulate(x_BSD: Tensor, film: Tensor) -> Tensor:
    """Apply scale and shift, [B, S, 2 D]."""
    scale_BSD, shift_BSD = film.chunk(2, dim=2)
    return torch.addcmul(shift_BSD, 1 + scale_BSD, x_BSD)
