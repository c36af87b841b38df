"""Latents of a whole dataset, encoded once and cached, so that pretraining never runs the encoder.

A cache folder holds ``train.hdf5``, ``valid.hdf5`` and ``test.hdf5``; each has one group per trajectory with
``z`` [T, C, x, y, z] and ``geometry`` [C, x, y, z] (normalised latents, float32), ``solid_fraction`` [x, y, z]
(share of solid voxels under each latent) and the attributes ``domain``, ``source`` (the data file) and
``sample`` (which trajectory of that file).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.config import COMPRESSION
from shodh_moe.data import SPLITS, Trajectory, TrajectoryRecord, list_trajectories
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.loader import WORKERS, Snapshots, read_batches
from shodh_moe.data.symmetry import Symmetry
from shodh_moe.errors import UserError
from shodh_moe.progress import progress
from shodh_moe.tokenizer.tokenizer import Tokenizer

# Snapshots encoded at a time.
BATCH = 8


@dataclass(frozen=True)
class LatentTrajectory:
    """One trajectory in latent space. The latents stay on disk until they are read."""

    domain: str
    source: str
    sample: int
    z: h5py.Dataset
    geometry_Cxyz: Tensor
    solid_fraction_xyz: Tensor

    @property
    def snapshots(self) -> int:
        return self.z.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Latents of snapshots start..stop, float32 [T, C, x, y, z]."""
        return torch.from_numpy(self.z[start:stop])


@torch.no_grad()
def encode_dataset(
    tokenizer: Tokenizer,
    dataset: Path,
    folder: Path,
    copies: int,
    seed: int,
    device: str = "cpu",
    skip_bad: bool = False,
) -> None:
    """Encode every trajectory of every split into ``folder`` (which should be a temporary one).

    Each training trajectory is encoded ``copies`` times: as it is, and under random symmetries of its flow.
    Shifts by other than whole latent cells give latents that the first copy does not have. Only a few batches of
    snapshots are in memory at a time.
    """
    tokenizer = tokenizer.to(device).eval()
    listed = {split: list_trajectories(dataset, split, tokenizer.grid, skip_bad) for split in SPLITS}
    snapshots = Snapshots([record for records in listed.values() for record in records])
    parts, works, first = [], [], 0
    for split, records in listed.items():
        for number, record in enumerate(records):
            for copy in range(copies if split == "train" else 1):
                symmetry = Symmetry()
                if copy:
                    symmetry = Symmetry.draw_for(np.random.default_rng([seed, number, copy]), record)
                for start in range(0, record.n_snapshots, BATCH):
                    parts.append(range(first + start, first + min(start + BATCH, record.n_snapshots)))
                    works.append((split, record, copy, symmetry, start))
            first += record.n_snapshots
    reads = read_batches(snapshots, parts, WORKERS, pin=torch.device(device).type == "cuda")
    with ExitStack() as stack:
        files = {split: stack.enter_context(new_hdf5(folder / f"{split}.hdf5")) for split in SPLITS}
        for (split, record, copy, symmetry, start), fields_B5XYZ in zip(
            progress(works, "encode latents", len(works)), reads, strict=True
        ):
            fields_B5XYZ = symmetry.apply(fields_B5XYZ.to(device, non_blocking=True))
            name = f"{record.path.name}.{record.sample:04d}.{copy:04d}"
            if not start:
                _new_group(files[split], name, record, tokenizer, fields_B5XYZ[:1, 4:])
            stop = start + len(fields_B5XYZ)
            files[split][name]["z"][start:stop] = tokenizer.encode(fields_B5XYZ).cpu().numpy()


def _new_group(file: h5py.File, name: str, record: TrajectoryRecord, tokenizer: Tokenizer, solid_11XYZ: Tensor) -> None:
    """The group of a trajectory, all but its latents."""
    group = file.create_group(name)
    group.attrs.update(domain=record.domain, source=record.path.name, sample=record.sample)
    shape = (record.n_snapshots, tokenizer.config.latent_channels, *tokenizer.latent_grid)
    group.create_dataset("z", shape, "float32")
    group["geometry"] = tokenizer.encode_geometry(solid_11XYZ)[0].cpu().numpy()
    group["solid_fraction"] = F.avg_pool3d(solid_11XYZ, COMPRESSION)[0, 0].cpu().numpy()


def trajectory_fields(trajectory: Trajectory) -> Tensor:
    """A data trajectory as encoder input, float32 [T, 5, X, Y, Z]: velocity, pressure, solid mask."""
    velocity, pressure, solid = (
        torch.from_numpy(array)
        for array in (trajectory.velocity_T3XYZ, trajectory.pressure_T1XYZ, trajectory.solid_1XYZ)
    )
    return torch.cat([velocity, pressure, solid.expand(len(velocity), -1, -1, -1, -1)], dim=1)


def load_latents(folder: Path, split: str) -> list[LatentTrajectory]:
    """Every cached trajectory of a split, in the order of their names. The file stays open.

    Raises:
        UserError: the cache is missing or cannot be read.
    """
    path = folder / f"{split}.hdf5"
    try:
        file = h5py.File(path, "r")
        return [
            LatentTrajectory(
                domain=str(group.attrs["domain"]),
                source=str(group.attrs["source"]),
                sample=int(group.attrs["sample"]),
                z=group["z"],
                geometry_Cxyz=torch.from_numpy(group["geometry"][()]),
                solid_fraction_xyz=torch.from_numpy(group["solid_fraction"][()]),
            )
            for group in (file[name] for name in sorted(file))
        ]
    except (OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read latents {path} ({reason}): delete {folder} and run again") from error


class LatentSamples:
    """Training samples of a split: H latents, the geometry latent, the next latent; grouped by domain."""

    def __init__(self, trajectories: list[LatentTrajectory], history: int):
        self.trajectories, self.history = trajectories, history
        self.domains = sorted({trajectory.domain for trajectory in trajectories})
        self.index: list[list[tuple[int, int]]] = [[] for _ in self.domains]
        for number, trajectory in enumerate(trajectories):
            starts = range(trajectory.snapshots - history)
            self.index[self.domains.index(trajectory.domain)].extend((number, start) for start in starts)
        for domain, samples in zip(self.domains, self.index, strict=True):
            if not samples:
                raise UserError(f"no trajectory of domain {domain} has more than model.history = {history} snapshots")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples per domain."""
        return tuple(len(samples) for samples in self.index)

    def batch(self, samples: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(domain, index) pairs -> history [B, H, C, x, y, z], geometry, target [B, C, x, y, z], domain [B]."""
        history, geometry, target = [], [], []
        for domain, within in samples:
            number, start = self.index[domain][within]
            trajectory = self.trajectories[number]
            z_TCxyz = trajectory.read(start, start + self.history + 1)
            history.append(z_TCxyz[:-1])
            geometry.append(trajectory.geometry_Cxyz)
            target.append(z_TCxyz[-1])
        labels = torch.tensor([domain for domain, _ in samples])
        return torch.stack(history), torch.stack(geometry), torch.stack(target), labels

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Where a sample lies, and whether its values are finite."""
        number, start = self.index[domain][index]
        trajectory = self.trajectories[number]
        return {
            "domain": trajectory.domain,
            "file": trajectory.source,
            "trajectory": trajectory.sample,
            "first_snapshot": start,
            "finite": bool(torch.isfinite(trajectory.read(start, start + self.history + 1)).all()),
        }
