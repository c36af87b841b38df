"""Latents for a rehearsal: the shapes of a config's real ones, without files. All numbers are zero."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from shodh_moe.config import Config
from shodh_moe.runs.plan import latent_grid
from shodh_moe.tokenizer.latents import LatentSamples


@dataclass
class _Trajectory:
    """Stands for a `LatentTrajectory`."""

    domain: str
    z: SimpleNamespace
    geometry_Cxyz: Tensor
    snapshots: int
    source: str = "rehearsal"
    sample: int = 0
    copy: int = 0

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.zeros(len(range(self.snapshots)[start:stop]), *self.z.shape[1:])

    def mean_squared_change(self) -> float:
        return 1.0


def rehearsal_samples(config: Config, snapshots: int = 4) -> LatentSamples:
    """Samples of one short trajectory for each domain of the config."""
    shape = (config.tokenizer.latent_channels, *latent_grid(config))
    count = config.model.history + snapshots
    names = sorted(name for name, _ in config.data.domains.items())
    trajectories = [_Trajectory(name, SimpleNamespace(shape=(count, *shape)), torch.zeros(shape), count) for name in names]
    return LatentSamples(trajectories, config.model.history, None)  # type: ignore[arg-type]
