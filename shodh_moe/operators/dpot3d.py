"""A network in the style of DPOT for three-dimensional fields; see `dpot` for what is ours and what is published.

It differs from `DPOT2d` in two ways. The frames of the history are channels of one patch embedding, which includes the
aggregation over time. And all wave numbers of the patch grid are kept: with patches of 4 cells, 32^3 cells are 8^3
patches, fewer than the modes that DPOT keeps.

Shapes: B batch, C channels, X Y Z grid, x y z patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.operators.dpot import Block, DPOTSize, FourierAttention
from shodh_moe.operators.layers import initial_weights

SPACE = (1, 2, 3)


class FourierAttention3d(FourierAttention):
    """Apply the same two-layer network to every wave number, [B, x, y, z, D] to [B, x, y, z, D]."""

    def forward(self, x_BxyzD: Tensor) -> Tensor:
        with torch.autocast(x_BxyzD.device.type, enabled=False):
            dtype = torch.promote_types(self.weight1.dtype, torch.float32)
            z = self.mix(torch.fft.rfftn(x_BxyzD.to(dtype), dim=SPACE, norm="ortho"))
            return torch.fft.irfftn(z, s=x_BxyzD.shape[1:4], dim=SPACE, norm="ortho").to(x_BxyzD.dtype)


class DPOT3d(nn.Module):
    """Map fields [B, C_in, X, Y, Z] to [B, C_out, X, Y, Z]; before training the output is zero.

    Args:
        size: ``modes`` is not used.
        channels_in, channels_out: C_in and C_out.
        seed: seed of the initial weights.
    """

    def __init__(self, size: DPOTSize, channels_in: int, channels_out: int, seed: int = 0):
        super().__init__()
        self.size = size
        cells = size.patch**3
        with initial_weights(seed):
            self.embed = nn.Linear(channels_in * cells, size.width)
            self.aggregate = nn.Linear(size.width, size.width)
            self.blocks = nn.ModuleList(
                Block(size, FourierAttention3d(size.width, size.heads, size.modes)) for _ in range(size.blocks)
            )
            self.hidden = nn.Linear(size.width, cells * size.head_width)
            self.cell = nn.Linear(channels_in, size.head_width)
            self.out = nn.Linear(size.head_width, channels_out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, fields_BCXYZ: Tensor) -> Tensor:
        """Raises: UserError: a side of the grid is not a multiple of the patch."""
        b, _, *grid = fields_BCXYZ.shape
        p = self.size.patch
        if any(side % p for side in grid):
            raise UserError(f"a grid of {' x '.join(map(str, grid))} cannot be cut into patches of {p} cells a side")
        x, y, z = (side // p for side in grid)
        cells_BXYZC = fields_BCXYZ.movedim(1, -1)
        patches = cells_BXYZC.reshape(b, x, p, y, p, z, p, -1).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
        tokens_BxyzD = self.aggregate(F.gelu(self.embed(patches)))
        for block in self.blocks:
            tokens_BxyzD = block(tokens_BxyzD, None)
        hidden = self.hidden(tokens_BxyzD).view(b, x, y, z, p, p, p, -1)
        hidden_BXYZF = hidden.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *grid, -1)
        return self.out(F.gelu(hidden_BXYZF + self.cell(cells_BXYZC))).movedim(-1, 1)
