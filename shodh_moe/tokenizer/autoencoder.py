"""Convolutional encoder and decoder, 8x smaller per axis (DESIGN 3.2).

Shapes: B batch, C channels, X Y Z space. All convolutions wrap around: the flows live on a torus, and
where a domain is not periodic its own solid voxels or lid separate the two sides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def space_to_depth(x_BCXYZ: Tensor, factor: int = 2) -> Tensor:
    """Fold each cube of ``factor``^3 voxels into channels: [B, C f^3, X/f, Y/f, Z/f]."""
    b, c, nx, ny, nz = x_BCXYZ.shape
    f = factor
    x = x_BCXYZ.reshape(b, c, nx // f, f, ny // f, f, nz // f, f)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * f**3, nx // f, ny // f, nz // f)


def depth_to_space(x_BCXYZ: Tensor, factor: int = 2) -> Tensor:
    """Inverse of `space_to_depth`: [B, C / f^3, X f, Y f, Z f]."""
    b, c, nx, ny, nz = x_BCXYZ.shape
    f = factor
    x = x_BCXYZ.view(b, c // f**3, f, f, f, nx, ny, nz)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // f**3, nx * f, ny * f, nz * f)


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, 3, padding=1, padding_mode="circular")


def _silence(layer: nn.Conv3d) -> None:
    """Make a layer's output zero until it has learned something."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the second convolution zero at the start."""

    def __init__(self, channels: int):
        super().__init__()
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """Normalised fields [B, 5, X, Y, Z] (velocity, pressure, solid) to latents [B, C, X/8, Y/8, Z/8].

    The latent is a linear projection of each 8^3 patch of velocity and pressure plus a convolutional
    correction that also sees the neighbours and the walls, zero before training (ours: the projection starts
    as the patches' principal components, and minutes of training go into what lies beyond them).
    """

    def __init__(self, widths: list[int], blocks: int, latent_channels: int):
        super().__init__()
        stages: list[nn.Module] = []
        channels = 5
        for width in widths:
            stages.append(_conv(8 * channels, width))
            stages.extend(ResidualBlock(width) for _ in range(blocks))
            channels = width
        self.down = nn.ModuleList(stages)
        self.head = nn.Conv3d(channels, latent_channels, 1)
        _silence(self.head)
        self.project = nn.Conv3d(4, latent_channels, 8, stride=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.project(x[:, :4])
        for layer in self.down:
            x = layer(x if isinstance(layer, ResidualBlock) else space_to_depth(x))
        return z + self.head(x)


class Decoder(nn.Module):
    """Latents and the known geometry to a raw velocity and a pressure, both zero in solid voxels.

    The solid mask is an input of every simulation, so each stage sees it at its own resolution (ours):
    the latents need not spend channels on where the walls are. The mirror image of `Encoder`: linear patches
    plus a convolutional correction that is zero before training.
    """

    FINE = 16  # channels at full resolution

    def __init__(self, widths: list[int], blocks: int, latent_channels: int):
        super().__init__()
        self.stem = _conv(latent_channels, widths[-1])
        self.geometry, self.blocks, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(3)):
            width, finer = widths[level], widths[level - 1] if level else self.FINE
            self.geometry.append(nn.Conv3d(8 ** (level + 1), width, 1))
            self.blocks.append(nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))))
            self.up.append(nn.Conv3d(width, 8 * finer, 1))
        # Features times the mask give the last layer a say in what happens next to a wall.
        self.head = _conv(2 * self.FINE + 1, 4)
        _silence(self.head)
        self.patches = nn.ConvTranspose3d(latent_channels, 4, 8, stride=8, bias=False)

    def forward(self, z: Tensor, solid_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:
        """Raw velocity [B, 3, X, Y, Z] and pressure [B, 1, X, Y, Z]; normalised units."""
        x = self.stem(z)
        for i, (geometry, blocks, up) in enumerate(zip(self.geometry, self.blocks, self.up, strict=True)):
            x = depth_to_space(up(blocks(x + geometry(space_to_depth(solid_B1XYZ, 2 ** (3 - i))))))
        out = self.patches(z) + self.head(torch.cat([x, x * solid_B1XYZ, solid_B1XYZ], dim=1))
        out = out * (1 - solid_B1XYZ)
        return out[:, :3], out[:, 3:]
