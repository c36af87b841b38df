"""Latents of a whole dataset, encoded once and cached, so that pretraining never runs the encoder.

A cache folder holds ``train.hdf5``, ``valid.hdf5`` and ``test.hdf5``; each has one group per trajectory with
``z`` [T, C, x, y, z] and ``geometry`` [C, x, y, z] (normalised latents, float32), ``solid_fraction`` [x, y, z]
(share of solid voxels under each latent) and the attributes ``domain``, ``source`` (the data file) and
``sample`` (which trajectory of that file).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.config import COMPRESSION
from shodh_moe.data import SPLITS, Trajectory, list_trajectories, read_trajectory
from shodh_moe.errors import UserError
from shodh_moe.progress import progress
from shodh_moe.tokenizer.tokenizer import Tokenizer


@dataclass
class LatentTrajectory:
    """One trajectory in latent space."""

    domain: str
    source: str
    sample: int
    z_TCxyz: Tensor
    geometry_Cxyz: Tensor
    solid_fraction_xyz: Tensor


@torch.no_grad()
def encode_dataset(tokenizer: Tokenizer, dataset: Path, folder: Path, device: str = "cpu") -> None:
    """Encode every trajectory of every split into ``folder`` (which should be a temporary one)."""
    tokenizer = tokenizer.to(device).eval()
    work = [(split, record) for split in SPLITS for record in list_trajectories(dataset, split, tokenizer.grid)]
    files = {split: h5py.File(folder / f"{split}.hdf5", "w") for split in SPLITS}
    try:
        for split, record in progress(work, "encode latents", len(work)):
            fields, solid_1XYZ = trajectory_tensors(read_trajectory(record), device)
            z = torch.cat([tokenizer.encode(part) for part in fields.split(8)])
            group = files[split].create_group(f"{record.path.stem}.{record.sample:04d}")
            group.attrs.update(domain=record.domain, source=record.path.name, sample=record.sample)
            group["z"] = z.cpu().numpy()
            group["geometry"] = tokenizer.encode_geometry(solid_1XYZ[None])[0].cpu().numpy()
            group["solid_fraction"] = F.avg_pool3d(solid_1XYZ, COMPRESSION)[0].cpu().numpy()
    finally:
        for file in files.values():
            file.close()


def trajectory_tensors(trajectory: Trajectory, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A data trajectory as encoder input [T, 5, X, Y, Z] and its solid mask [1, X, Y, Z], float32."""
    velocity, pressure, solid = (
        torch.from_numpy(array).to(device)
        for array in (trajectory.velocity_T3XYZ, trajectory.pressure_T1XYZ, trajectory.solid_1XYZ)
    )
    return torch.cat([velocity, pressure, solid.expand(len(velocity), -1, -1, -1, -1)], dim=1), solid


def load_latents(folder: Path, split: str) -> list[LatentTrajectory]:
    """Every cached trajectory of a split, in the order of their names.

    Raises:
        UserError: the cache is missing or cannot be read.
    """
    path = folder / f"{split}.hdf5"
    try:
        with h5py.File(path, "r") as file:
            return [
                LatentTrajectory(
                    domain=str(group.attrs["domain"]),
                    source=str(group.attrs["source"]),
                    sample=int(group.attrs["sample"]),
                    z_TCxyz=torch.from_numpy(np.asarray(group["z"])),
                    geometry_Cxyz=torch.from_numpy(np.asarray(group["geometry"])),
                    solid_fraction_xyz=torch.from_numpy(np.asarray(group["solid_fraction"])),
                )
                for group in (file[name] for name in sorted(file))
            ]
    except (OSError, KeyError) as error:
        raise UserError(f"cannot read latents {path} ({error}): delete {folder} and encode again") from None


class LatentSamples:
    """Training samples of a split: H latents, the geometry latent, the next latent; grouped by domain."""

    def __init__(self, trajectories: list[LatentTrajectory], history: int):
        self.trajectories, self.history = trajectories, history
        self.domains = sorted({trajectory.domain for trajectory in trajectories})
        self.index: list[list[tuple[int, int]]] = [[] for _ in self.domains]
        for number, trajectory in enumerate(trajectories):
            starts = range(len(trajectory.z_TCxyz) - history)
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
            history.append(trajectory.z_TCxyz[start : start + self.history])
            geometry.append(trajectory.geometry_Cxyz)
            target.append(trajectory.z_TCxyz[start + self.history])
        labels = torch.tensor([domain for domain, _ in samples])
        return torch.stack(history), torch.stack(geometry), torch.stack(target), labels
