"""Training samples: short windows of consecutive frames of regimes, in the network's units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shodh_moe.ccm.data import Trajectories


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each channel. Networks see (field - mean) / std.

    Attributes:
        mean, std: one number per channel, in physical units.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, regimes: list[Trajectories]) -> Scale:
        """Compute the scale over all values of the regimes, in float64. A constant channel has std 1."""
        over = (0, 1, 3, 4)
        counts = torch.tensor([regime.fields[:, :, 0].numel() for regime in regimes], dtype=torch.float64)
        means = torch.stack([regime.fields.double().mean(over) for regime in regimes])
        squares = torch.stack([regime.fields.double().square().mean(over) for regime in regimes])
        weights = (counts / counts.sum())[:, None]
        mean = (weights * means).sum(0)
        std = ((weights * squares).sum(0) - mean.square()).clamp_min(0).sqrt()
        std[std < 1e-12] = 1.0
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def normalise(self, fields_CHW: Tensor) -> Tensor:
        """Convert [..., C, H, W] from physical units to the network's."""
        return (fields_CHW - self._of(self.mean, fields_CHW)) / self._of(self.std, fields_CHW)

    def restore(self, fields_CHW: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return fields_CHW * self._of(self.std, fields_CHW) + self._of(self.mean, fields_CHW)

    @staticmethod
    def _of(values: tuple[float, ...], like: Tensor) -> Tensor:
        return like.new_tensor(values)[:, None, None]


class Windows:
    """Windows of ``frames`` consecutive frames of the regimes' trajectories.

    The sampler treats each coordinate as a domain, so a coordinate in several splits is sampled as often as others.

    Attributes:
        domains: one name per coordinate.
        frames: number of frames in a window.
        sizes: number of windows per coordinate.
    """

    def __init__(self, regimes: list[Trajectories], scale: Scale, frames: int):
        coordinates = sorted({regime.coordinate for regime in regimes})
        self.domains, self.frames = [f"s={coordinate:+.3f}" for coordinate in coordinates], frames
        self._fields = [
            scale.normalise(torch.cat([regime.fields for regime in regimes if regime.coordinate == coordinate]))
            for coordinate in coordinates
        ]
        self._coordinates = torch.tensor(coordinates)
        self._starts = regimes[0].fields.shape[1] - frames + 1
        self.sizes = tuple(len(fields) * self._starts for fields in self._fields)

    def batch(self, picks: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Map (domain, index) pairs to frames [B, frames, C, H, W], coordinate [B] and domain [B]."""
        windows = []
        for domain, index in picks:
            trajectory, start = divmod(index, self._starts)
            windows.append(self._fields[domain][trajectory, start : start + self.frames])
        domain_B = torch.tensor([domain for domain, _ in picks])
        return torch.stack(windows), self._coordinates[domain_B], domain_B

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Describe a window, for the report on a loss that is not finite: its place, and whether it is finite."""
        trajectory, start = divmod(index, self._starts)
        finite = bool(torch.isfinite(self._fields[domain][trajectory, start : start + self.frames]).all())
        return {"domain": self.domains[domain], "trajectory": trajectory, "first_snapshot": start, "finite": finite}
