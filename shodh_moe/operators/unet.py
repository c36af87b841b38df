"""A plain U-Net for three-dimensional fields, as The Well's benchmark has it (arXiv 2412.00568, `UNetClassic`).

That network is PDEBench's (arXiv 2210.07182) and goes back to arXiv 1505.04597. Each level halves the grid and doubles
the channels; a level is two convolutions of 3^3 cells, each with batch norm and tanh.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.operators.layers import initial_weights


def _level(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv3d(channels, channels_out, 3, padding=1, bias=False), nn.BatchNorm3d(channels_out), nn.Tanh()]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Map fields [B, C_in, X, Y, Z] to [B, C_out, X, Y, Z].

    Args:
        channels_in, channels_out: C_in and C_out.
        width: channels of the first level; The Well takes 32 and more.
        levels: number of times that the grid is halved; The Well takes 4.
        seed: seed of the initial weights.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int = 32, levels: int = 4, seed: int = 0):
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        with initial_weights(seed):
            self.down = nn.ModuleList(map(_level, [channels_in, *widths[:-2]], widths[:-1]))
            self.bottom = _level(widths[-2], widths[-1])
            self.widen = nn.ModuleList(
                nn.ConvTranspose3d(2 * channels, channels, 2, stride=2) for channels in reversed(widths[:-1])
            )
            self.up = nn.ModuleList(_level(2 * channels, channels) for channels in reversed(widths[:-1]))
            self.out = nn.Conv3d(width, channels_out, 1)

    def forward(self, fields_BCXYZ: Tensor) -> Tensor:
        """Raises: UserError: a side of the grid cannot be halved ``levels`` times."""
        grid, factor = fields_BCXYZ.shape[2:], 2 ** len(self.down)
        if any(side % factor for side in grid):
            raise UserError(
                f"a grid of {' x '.join(map(str, grid))} cannot be halved {len(self.down)} times: take fewer levels"
            )
        x, kept = fields_BCXYZ, []
        for level in self.down:
            kept.append(level(x))
            x = nn.functional.max_pool3d(kept[-1], 2)
        x = self.bottom(x)
        for widen, level in zip(self.widen, self.up, strict=True):
            x = level(torch.cat([widen(x), kept.pop()], dim=1))
        return self.out(x)
