"""Data for a rehearsal: in the shapes of a config's real data, without files. All numbers are zero."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.boundaries import UNKNOWN_CODE
from shodh_moe.config import Config
from shodh_moe.config.window import Window
from shodh_moe.runs.plan import latent_grid
from shodh_moe.tokenizer.latents import WHOLE, LatentSamples
from shodh_moe.training.tokenizer_task import DescribedSnapshots


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

    def read(self, start: int = 0, stop: int | None = None, step: int = 1, slab: slice = WHOLE) -> Tensor:
        _, channels, *grid = self.z.shape
        grid[0] = len(range(grid[0])[slab])
        return torch.zeros(len(range(self.snapshots)[start:stop:step]), channels, *grid)

    def boundaries(self) -> Tensor:
        return torch.full((3, 2), UNKNOWN_CODE)

    def mean_squared_change(self) -> float:
        return 1.0


def latent_samples(config: Config, extra: int = 4) -> LatentSamples:
    """Samples of one short trajectory of each domain of the config, which holds a window and ``extra`` snapshots."""
    shape = (config.tokenizer.latent_channels, *latent_grid(config))
    ahead, strides = config.training.unroll, config.model.strides
    count = Window(config.model.history, ahead, strides[-1]).snapshots + extra
    z = SimpleNamespace(shape=(count, *shape))
    trajectories = [_Trajectory(domain, z, torch.zeros(shape), count) for domain in _domains(config)]
    return LatentSamples(trajectories, config.model.history, None, strides, ahead)  # type: ignore[arg-type]


class _NoFiles(DescribedSnapshots):
    def read(self, index: int, out_5XYZ: NDArray[np.float32]) -> None:
        out_5XYZ.fill(0)


def snapshots(config: Config, count: int = 2) -> DescribedSnapshots:
    """A trajectory of ``count`` snapshots of each domain of the config."""
    records = [
        SimpleNamespace(
            domain=domain,
            path=Path("rehearsal"),
            sample=0,
            grid=tuple(config.data.grid),
            n_snapshots=count,
            periodic=(True, True, True),
            forced=True,
        )
        for domain in _domains(config)
    ]
    return _NoFiles(records)  # type: ignore[arg-type]


def _domains(config: Config) -> list[str]:
    return sorted(name for name, _ in config.data.domains.items())
