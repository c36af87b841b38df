"""The feed-forward networks of a mixture of experts: shared ones and the routed ones a rank holds.

Shapes: L local experts, T rows an expert gets, D model width, F hidden width.
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
    """L SwiGLU experts as stacked weights, one batched product for all.

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
