"""Fluid speed at each token, from the data that the latents were made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import COMPRESSION, Config
from shodh_moe.data import TrajectoryRecord, list_trajectories, read_snapshots
from shodh_moe.tokenizer.latents import LatentTrajectory

Speeds = dict[tuple[str, int], Tensor]  # by file name and number of the trajectory in it
BATCH = 8  # snapshots read at a time


def local_speed(record: TrajectoryRecord, patch: int, compression: int = COMPRESSION) -> Tensor:
    """Mean of |u| over the cells of each token, including solid cells: float32 [T, x, y, z] in the data's units.

    A token is a cube with ``patch * compression`` cells along each axis; T counts snapshots.

    Raises:
        UserError: see `read_snapshots`.
    """
    parts = []
    for start in range(0, record.n_snapshots, BATCH):
        fields_T4XYZ, _ = read_snapshots(record, start, min(start + BATCH, record.n_snapshots))
        speed_T1XYZ = torch.from_numpy(fields_T4XYZ[:, :3]).norm(dim=1, keepdim=True)
        parts.append(F.avg_pool3d(speed_T1XYZ, patch * compression)[:, 0])
    return torch.cat(parts)


def local_speeds(config: Config, dataset: Path, split: str, trajectories: Iterable[LatentTrajectory]) -> Speeds:
    """`local_speed` of the data of each latent trajectory of a split, by (source, sample).

    Raises:
        UserError: a trajectory's data are not in ``dataset``, or cannot be read.
    """
    listed = list_trajectories(dataset, split, config.data.grid, config.data.skip_bad)
    records = {(record.path.name, record.sample): record for record in listed}
    speeds = {}
    for one in trajectories:
        if (one.source, one.sample) not in records:
            raise UserError(
                f"trajectory {one.sample} of {one.source} has latents but is not in the {split} split of {dataset}: "
                "give the dataset that the latents were made from"
            )
        speeds[one.source, one.sample] = local_speed(records[one.source, one.sample], config.model.patch)
    return speeds
