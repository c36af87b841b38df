"""A network in the style of DPOT, the denoising operator transformer (Hao et al., arXiv 2403.03542).

As published: patches, Fourier attention (the blocks of AFNO, arXiv 2111.13587, without its sparsity), one linear
aggregation of the history, and multilayer perceptrons of ratio 1. Our changes:

- layer norm instead of group norm;
- coordinates instead of a learned embedding of each position, so any grid of whole patches is allowed;
- the output is the change from the last frame;
- no factor cos(gamma t) in the aggregation, because its matrix can represent it for a fixed number of frames;
- a head that also sees each cell's own history (with it, the error after 300 steps on a small reaction-diffusion set
  is a third smaller).

Noise on the input, the "denoising", belongs to training. Like the published network, this one does not commute with
shifts, even by whole patches: a shift rotates the phases of Fourier coefficients, and GELU acts on their real and
imaginary parts separately.

Shapes: B batch, T frames of history, C channels, H W grid, h w patches, D width, P and Q kept wave numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.operators.layers import (
    COORDINATES,
    Coordinates,
    initial_weights,
    make_modulation,
    modulate,
    modulations,
    with_coordinates,
)
from shodh_moe.operators.spectral import from_modes, to_modes


@dataclass(frozen=True)
class DPOTSize:
    """Sizes of a `DPOT2d`.

    Attributes:
        width: channels of a patch.
        patch: cells per side of a patch.
        blocks: number of blocks.
        heads: number of diagonal blocks in the channel mixing of the Fourier attention.
        modes: kept wave numbers, see `spectral.wavenumbers`.
        head_width: channels of a cell in the output head.
    """

    width: int
    patch: int
    blocks: int = 4
    heads: int = 4
    modes: int = 32
    head_width: int = 32


# large has the width, depth, heads, patches and modes of DPOT-Tiny; tiny is ours, for a CPU.
DPOT_SIZES = {"tiny": DPOTSize(128, patch=4), "large": DPOTSize(512, patch=8)}


class FourierAttention(nn.Module):
    """Apply the same two-layer network to every kept wave number, [B, h, w, D] to [B, h, w, D].

    It is block-diagonal over the channels. Weights are real with a last axis (real, imaginary), as in the FNO; GELU
    acts on each part. Computes in float32 or float64, also under autocast.
    """

    def __init__(self, width: int, heads: int, modes: int):
        super().__init__()
        self.heads, self.modes = heads, modes
        block = width // heads
        self.weight1 = nn.Parameter(torch.randn(heads, block, block, 2) * block**-0.5)
        self.weight2 = nn.Parameter(torch.randn(heads, block, block, 2) * (2 * block) ** -0.5)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(heads, 1, block, 2)) for _ in range(2))

    def forward(self, x_BhwD: Tensor) -> Tensor:
        _, h, w, _ = x_BhwD.shape
        scale = (h * w) ** 0.5  # the orthonormal transform: white noise has coefficients of order one on every grid
        with torch.autocast(x_BhwD.device.type, enabled=False):
            dtype = torch.promote_types(self.weight1.dtype, torch.float32)
            z_PQBD = self.mix(to_modes(x_BhwD.to(dtype), self.modes) * scale)
            return (from_modes(z_PQBD, h, w, self.modes) / scale).to(x_BhwD.dtype)

    def mix(self, z: Tensor) -> Tensor:
        """Apply the network to Fourier coefficients, complex [..., D] to [..., D]."""
        dtype = z.real.dtype
        weight1, weight2, bias1, bias2 = (
            torch.view_as_complex(parameter.to(dtype))
            for parameter in (self.weight1, self.weight2, self.bias1, self.bias2)
        )
        by_head = z.reshape(-1, self.heads, z.shape[-1] // self.heads).transpose(0, 1)
        by_head = torch.view_as_complex(F.gelu(torch.view_as_real(torch.baddbmm(bias1, by_head, weight1))))
        return torch.baddbmm(bias2, by_head, weight2).transpose(0, 1).reshape(z.shape)


class Block(nn.Module):
    """Fourier attention and a multilayer perceptron, each behind a layer norm and with a residual connection."""

    def __init__(self, size: DPOTSize, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(size.width, size.width), nn.GELU(), nn.Linear(size.width, size.width))

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        x = x + self.attention(modulate(self.norm1(x), modulation))
        return x + self.mlp(self.norm2(x))


class DPOT2d(nn.Module):
    """Predict the next frame of a field as the last frame plus the network's output; same interface as `FNO2d`.

    Before training it predicts that nothing changes. Fields should be normalised to order one.

    Args:
        size: one of `DPOT_SIZES`.
        channels: C, the number of channels of a frame.
        history: T, the number of input frames.
        conditions: number of physical parameters given as input, 0 for none.
        coordinates: input channels with positions, see `layers.with_coordinates`; for walls and forces that vary in
            space.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        size: DPOTSize,
        channels: int,
        *,
        history: int = 1,
        conditions: int = 0,
        coordinates: Coordinates = "none",
        seed: int = 0,
    ):
        super().__init__()
        self.size, self.channels, self.history, self.coordinates = size, channels, history, coordinates
        cells = size.patch**2
        with initial_weights(seed):
            self.embed = nn.Linear((channels + COORDINATES[coordinates]) * cells, size.width)
            self.aggregate = nn.Linear(history * size.width, size.width)
            self.blocks = nn.ModuleList(
                Block(size, FourierAttention(size.width, size.heads, size.modes)) for _ in range(size.blocks)
            )
            self.modulation = make_modulation(conditions, size.width, size.blocks)
            self.hidden = nn.Linear(size.width, cells * size.head_width)
            self.cell = nn.Linear(channels * history, size.head_width)
            self.out = nn.Linear(size.head_width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, history_BTCHW: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the next frame, [B, C, H, W], from T frames, the newest last.

        Args:
            history_BTCHW: real [B, T, C, H, W].
            condition: parameters, [B] or [B, conditions], scaled to order one.

        Raises:
            UserError: H or W is not a multiple of the patch.
            ValueError: ``condition`` is given but the network takes none, or is missing or of another length.
        """
        b, t, _, height, width = history_BTCHW.shape
        p = self.size.patch
        if height % p or width % p:
            raise UserError(f"a grid of {height} x {width} cannot be cut into patches of {p} x {p} cells")
        h, w = height // p, width // p
        x = history_BTCHW.flatten(0, 1).movedim(1, -1).to(self.embed.weight.dtype)
        x = with_coordinates(x, self.coordinates)
        x = x.view(b, t, h, p, w, p, -1).permute(0, 2, 4, 1, 3, 5, 6).flatten(4)  # [B, h, w, T, cells and channels]
        x = self.aggregate(F.gelu(self.embed(x)).flatten(3))
        for block, modulation in zip(
            self.blocks, modulations(self.modulation, condition, self.size.blocks), strict=True
        ):
            x = block(x, modulation)
        x = self.hidden(x).view(b, h, w, p, p, -1).transpose(2, 3).reshape(b, height, width, -1)
        x = x + self.cell(history_BTCHW.flatten(1, 2).movedim(1, -1).to(x.dtype))
        return history_BTCHW[:, -1] + self.out(F.gelu(x)).movedim(-1, 1)
