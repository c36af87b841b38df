"""Fourier neural operator in two dimensions (Li et al., arXiv 2010.08895).

CCM does not use neuraloperator 2.0.0 (MIT), because it depends on 32 other packages (wandb 20 MB, tensorly 7 MB,
opentelemetry, requests), its state_dict() holds a dictionary, it loads pickles, and its spectral weights are always
complex64.

Shapes: B batch, T frames of history, C channels, H W grid, D width. Inside, the channels are last.
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
class FNOSize:
    """Sizes of an `FNO2d`.

    Attributes:
        width: channels inside the network.
        modes: kept wave numbers, -modes ... modes - 1 along H and 0 ... modes - 1 along W.
        blocks: number of blocks.
    """

    width: int
    modes: int
    blocks: int = 4


# small, medium and large are those of the CCM paper (arXiv 2605.14546). The others are ours, for a CPU: tiny, and the
# paper's three at half the width and half the modes.
FNO_SIZES = {
    "tiny": FNOSize(24, 10),
    "small": FNOSize(48, 12),
    "medium": FNOSize(64, 16),
    "large": FNOSize(80, 20),
    "half_small": FNOSize(24, 6),
    "half_medium": FNOSize(32, 8),
    "half_large": FNOSize(40, 10),
}


class SpectralConv(nn.Module):
    """Multiply the channels by a separate matrix for every kept wave number: [B, H, W, D] to [B, H, W, D].

    The complex weights are a real tensor with a last axis (real, imaginary), so that optimizers, gradient reduction and
    file formats see only real numbers. Computes in float32 or float64, also under autocast.
    """

    def __init__(self, width: int, modes: int):
        super().__init__()
        self.modes = modes
        # As small as in Li et al. Weights of width ** -0.5, which would preserve a field's power, train far worse: on a
        # small reaction-diffusion set the rollout error after 300 steps was four times as large.
        self.weight = nn.Parameter(torch.randn(2 * modes, modes, width, width, 2) / width**2)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        b, h, w, d = x_BHWD.shape
        with torch.autocast(x_BHWD.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)  # there is no complex bfloat16
            z = to_modes(x_BHWD.to(dtype), self.modes).view(-1, b, d)
            z = torch.bmm(z, torch.view_as_complex(self.weight.to(dtype)).view(-1, d, d))
            return from_modes(z.view(2 * self.modes, self.modes, b, d), h, w, self.modes).to(x_BHWD.dtype)


class FNO2d(nn.Module):
    """Predict the next frame of a field as the last frame plus the network's output.

    Without ``coordinates`` and ``padding`` the network commutes with shifts of a periodic domain, and the same weights
    work on every grid that has the kept wave numbers. Before training it predicts that nothing changes. Fields should
    be normalised to order one. ``seed`` is the only source of randomness.

    Args:
        size: one of `FNO_SIZES`.
        channels: C, the number of channels of a frame.
        history: T, the number of input frames.
        conditions: number of physical parameters given as input, 0 for none.
        coordinates: input channels with positions, see `layers.with_coordinates`; for walls and forces that vary in
            space.
        padding: zeros appended to each axis, as a share of its length, and removed from the output; for domains that
            are not periodic.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        size: FNOSize,
        channels: int,
        *,
        history: int = 1,
        conditions: int = 0,
        coordinates: Coordinates = "none",
        padding: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.size, self.channels, self.history = size, channels, history
        self.coordinates, self.padding = coordinates, padding
        width = size.width
        with initial_weights(seed):
            self.lift = nn.Linear(channels * history + COORDINATES[coordinates], width)
            self.spectral = nn.ModuleList(SpectralConv(width, size.modes) for _ in range(size.blocks))
            self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(size.blocks))
            self.modulation = make_modulation(conditions, width, size.blocks)
            self.hidden = nn.Linear(width, 2 * width)
            self.out = nn.Linear(2 * width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, history_BTCHW: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the next frame, [B, C, H, W], from T frames, the newest last.

        Args:
            history_BTCHW: real [B, T, C, H, W].
            condition: parameters, [B] or [B, conditions], scaled to order one.

        Raises:
            UserError: the grid (with its padding) has fewer than 2 * modes points on a side.
            ValueError: ``condition`` is given but the network takes none, or is missing or of another length.
        """
        h, w = history_BTCHW.shape[-2:]
        x = history_BTCHW.flatten(1, 2).movedim(1, -1).to(self.lift.weight.dtype)
        x = self.lift(with_coordinates(x, self.coordinates))
        x = F.pad(x, (0, 0, 0, round(self.padding * w), 0, round(self.padding * h)))
        if min(x.shape[1:3]) < 2 * self.size.modes:
            raise UserError(
                f"a grid of {h} x {w} is too coarse for an FNO with {self.size.modes} modes: "
                f"take at least {2 * self.size.modes} points on each side, or a network with fewer modes"
            )
        for block, modulation in enumerate(modulations(self.modulation, condition, self.size.blocks)):
            x = modulate(self.spectral[block](x) + self.pointwise[block](x), modulation)
            if block < self.size.blocks - 1:
                x = F.gelu(x)
        change = self.out(F.gelu(self.hidden(x[:, :h, :w])))
        return history_BTCHW[:, -1] + change.movedim(-1, 1)
