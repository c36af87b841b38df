"""The feed-forward networks of a mixture of experts: shared ones and the routed ones a rank holds.

Shapes: L local experts, T rows an expert gets, R rows of all experts, D model width, F hidden width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """L SwiGLU experts as stacked weights: one batched product for all, or a grouped one for uneven shares.

    Each expert's initial weights come from its own random stream (seed, layer, global index), so the same
    expert starts equal on whatever rank it lives.
    """

    def __init__(self, dim: int, hidden: int, global_indices: range, seed: int, layer: int):
        super().__init__()
        self.gate_up_LDF = nn.Parameter(torch.empty(len(global_indices), dim, 2 * hidden))
        self.down_LFD = nn.Parameter(torch.empty(len(global_indices), hidden, dim))
        for local, expert in enumerate(global_indices):
            stream = int(np.random.SeedSequence([seed, layer, expert]).generate_state(1, np.uint64)[0] >> 1)
            generator = torch.Generator().manual_seed(stream)
            for weight in (self.gate_up_LDF, self.down_LFD):
                bound = weight.shape[1] ** -0.5  # what nn.Linear uses
                weight.data[local].uniform_(-bound, bound, generator=generator)

    def forward(self, x_LTD: Tensor) -> Tensor:
        gate, up = torch.bmm(x_LTD, self.gate_up_LDF).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_LFD)

    def grouped(self, x_RD: Tensor, count_L: Tensor) -> Tensor:
        """As `forward`, for rows sorted by expert: the first ``count_L[0]`` for expert 0, and so on. [R, D]."""
        gate, up = _grouped_product(x_RD, self.gate_up_LDF, count_L).chunk(2, dim=-1)
        return _grouped_product(F.silu(gate) * up, self.down_LFD, count_L)


def _grouped_product(x_RD: Tensor, weight_LDF: Tensor, count_L: Tensor) -> Tensor:
    """Rows of group l times weight l, [R, F]."""
    # Torch's grouped product (2.10 on) has a kernel for bfloat16 on GPUs, of rows that are multiples of 16 bytes.
    fits = all(size % 8 == 0 for size in weight_LDF.shape[1:])
    if x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and fits and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x_RD, weight_LDF, offs=count_L.cumsum(0, dtype=torch.int32))
    shares = x_RD.split(count_L.tolist())
    return torch.cat([share @ weight for share, weight in zip(shares, weight_LDF, strict=True)])
