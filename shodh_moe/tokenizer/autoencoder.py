"""Convolutional encoder and decoder, 8x smaller per axis (DESIGN 3.2).

Shapes: B batch, C channels, X Y Z space. All convolutions are periodic: the flows live on a torus, and the solid voxels
or the lid of a domain that is not periodic separate its two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shodh_moe.tokenizer.lapped import overlap, separate


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


class _Wrap(torch.autograd.Function):
    """Pad each side of the box by one layer of voxels from the opposite side: [B, C, X + 2, Y + 2, Z + 2].

    The backward pass of torch's circular padding makes six copies of the box; this one makes a single copy and adds the
    gradient of the padding to the voxels that it came from.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.pad(x, (1,) * 6, mode="circular")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            last = grad.shape[axis] - 1
            inner = grad.narrow(axis, 1, last - 1)
            if axis == 2:
                inner = inner.clone()
            inner.select(axis, 0).add_(grad.select(axis, last))
            inner.select(axis, last - 2).add_(grad.select(axis, 0))
            grad = inner
        return grad


class WrappingConv(nn.Conv3d):
    """3^3 convolution on the torus, [B, C, X, Y, Z] with unchanged X, Y and Z."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(_Wrap.apply(x), self.weight, self.bias)


class Norm(nn.GroupNorm):
    """Group normalisation with statistics in float32.

    Returns the dtype of the input, also under autocast, where torch would return float32 on a GPU: the next convolution
    would round that to bfloat16, and autograd would keep twice the memory.
    """

    def __init__(self, channels: int):
        super().__init__(next(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _recomputed(on: bool, stage: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``stage(*inputs)``; if ``on``, autograd keeps only its inputs, and the backward pass recomputes it."""
    if on and torch.is_grad_enabled():
        # The random state need not be preserved, since a stage draws no random numbers.
        return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)
    return stage(*inputs)


def _set_to_zero(layer: nn.Module) -> None:
    """Set a layer's weights and bias to zero, so that its output is zero before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), where the outer convolution's weights start at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = Norm(channels), Norm(channels)
        self.conv1, self.conv2 = WrappingConv(channels, channels), WrappingConv(channels, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """Normalised fields [B, 5, X, Y, Z] (velocity, pressure, solid) to latents [B, C, X/8, Y/8, Z/8].

    The latent is a linear projection of each 8^3 patch of velocity and pressure, plus a convolutional correction that
    also sees the neighbours and the walls and is zero before training. (Our choice: the projection starts as the
    patches' principal components, so that training only has to learn the correction.)

    Args:
        overlapping: whether the patches overlap, see `lapped`.

    Attributes:
        checkpointing: whether training stores only each stage's input and recomputes the stage in the backward pass.
    """

    def __init__(self, widths: list[int], blocks: int, latent_channels: int, overlapping: bool = False):
        super().__init__()
        self.checkpointing, self._stage_layers, self._overlapping = False, 1 + blocks, overlapping
        stages: list[nn.Module] = []
        channels = 5
        for width in widths:
            stages.append(WrappingConv(8 * channels, width))
            stages.extend(ResidualBlock(width) for _ in range(blocks))
            channels = width
        self.down = nn.ModuleList(stages)
        self.head = nn.Conv3d(channels, latent_channels, 1)
        _set_to_zero(self.head)
        self.project = nn.Conv3d(4, latent_channels, 8, stride=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flow = x[:, :4]
        z = self.project(overlap(flow) if self._overlapping else flow)
        for first in range(0, len(self.down), self._stage_layers):
            layers = self.down[first : first + self._stage_layers]
            x = _recomputed(self.checkpointing, partial(_down, layers), x)
        return z + self.head(x)


def _down(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    x = space_to_depth(x)
    for layer in layers:
        x = layer(x)
    return x


class Decoder(nn.Module):
    """Latents and the known geometry to a raw velocity and a pressure, both zero in solid voxels.

    The solid mask is an input of every simulation, so each stage sees it at its own resolution and the latents need no
    channels for the walls (our choice). Mirrors `Encoder`: linear patches plus a convolutional correction that is zero
    before training.

    Args:
        overlapping: as for `Encoder`.
        refine: channels of a further correction, which sees the sum of patches and correction; 0 for none.

    Attributes:
        checkpointing: as for `Encoder`.
    """

    FINE = 16  # channels at full resolution

    def __init__(
        self, widths: list[int], blocks: int, latent_channels: int, overlapping: bool = False, refine: int = 0
    ):
        super().__init__()
        self.checkpointing, self._overlapping = False, overlapping
        self.stem = WrappingConv(latent_channels, widths[-1])
        self.geometry, self.blocks, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(3)):
            width, finer = widths[level], widths[level - 1] if level else self.FINE
            self.geometry.append(nn.Conv3d(8 ** (level + 1), width, 1))
            self.blocks.append(nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))))
            self.up.append(nn.Conv3d(width, 8 * finer, 1))
        # Features times the mask let the last layer treat voxels next to a wall differently.
        self.head = WrappingConv(2 * self.FINE + 1, 4)
        _set_to_zero(self.head)
        self.patches = nn.ConvTranspose3d(latent_channels, 4, 8, stride=8, bias=False)
        self.refinement = _Refinement(4 + self.FINE + 1, refine) if refine else None

    def forward(self, z: Tensor, solid_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:
        """Raw velocity [B, 3, X, Y, Z] and pressure [B, 1, X, Y, Z]; normalised units."""
        x = self.stem(z)
        for i in range(len(self.up)):
            x = _recomputed(self.checkpointing, partial(self._up, i), x, solid_B1XYZ)
        patches = separate(self.patches(z)) if self._overlapping else self.patches(z)
        out = patches + _recomputed(self.checkpointing, self._correction, x, solid_B1XYZ)
        out = out * (1 - solid_B1XYZ)
        if self.refinement is not None:
            inputs = torch.cat([out, x, solid_B1XYZ.to(x.dtype)], dim=1)
            out = out + (1 - solid_B1XYZ) * _recomputed(self.checkpointing, self.refinement, inputs)
        return out[:, :3], out[:, 3:]

    def _up(self, i: int, x: Tensor, solid_B1XYZ: Tensor) -> Tensor:
        x = x + self.geometry[i](space_to_depth(solid_B1XYZ, 2 ** (3 - i)))
        return depth_to_space(self.up[i](self.blocks[i](x)))

    def _correction(self, x: Tensor, solid_B1XYZ: Tensor) -> Tensor:
        solid_B1XYZ = solid_B1XYZ.to(x.dtype)
        return self.head(torch.cat([x, x * solid_B1XYZ, solid_B1XYZ], dim=1))


class _Refinement(nn.Sequential):
    """Two more convolutions at full resolution, [B, C, X, Y, Z] to [B, 4, X, Y, Z]; zero before training.

    They see the decoded fields themselves, on both sides of a border of patches, and can thus smooth its step.
    """

    def __init__(self, channels_in: int, channels: int):
        super().__init__(WrappingConv(channels_in, channels), nn.SiLU(), WrappingConv(channels, 4))
        _set_to_zero(self[2])
