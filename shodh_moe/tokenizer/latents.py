"""Read the cached latents of a dataset, one trajectory at a time or as training samples.

`encoding` encodes a dataset once, so that pretraining never runs the encoder. A cache folder holds ``train.hdf5``,
``valid.hdf5`` and ``test.hdf5``. Each file has one group per trajectory with ``z`` [T, C, x, y, z] and ``geometry``
[C, x, y, z] (normalised latents, float32), ``solid_fraction`` [x, y, z] (fraction of solid voxels in each latent's
patch, float32) and the attributes ``domain``, ``source`` (data file), ``sample`` (number of the trajectory in that
file), ``copy`` (0: the trajectory itself), ``mean_squared_change`` (of z from snapshot to snapshot; absent in older
caches) and the symmetry of the copy: ``shift``, ``mirror``, ``order``.

The attributes of the file record the latents' origin: ``tokenizer_sha256`` (of all weights and statistics),
``tokenizer`` (its folder), ``dataset`` (its folder), ``stats_sha256`` (of the dataset's statistics), ``grid`` (of the
fields), ``latent_channels``, ``copies``, ``symmetries``, ``seed`` and, except in older caches, ``data`` (identity of
the dataset), ``data_version`` (of generated data) and ``latents_version`` (of the code).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import NAME_RULE, is_name
from shodh_moe.config import COMPRESSION
from shodh_moe.config.inputs import NAMES, Inputs
from shodh_moe.data.sampler import domain_weights
from shodh_moe.model import Context

WHOLE = slice(None)  # of an axis


@dataclass(frozen=True)
class LatentTrajectory:
    """One trajectory in latent space. The latents stay on disk until they are read.

    Attributes:
        domain: name of its domain.
        source: name of the data file.
        sample: number of the trajectory in that file.
        z: normalised latents on disk, float32 [T, C, x, y, z].
        geometry_Cxyz: geometry latent, float32.
        solid_fraction_xyz: fraction of solid voxels in each latent's patch, float32.
        copy: 0 for the trajectory itself, otherwise the number of its copy under a symmetry.
    """

    domain: str
    source: str
    sample: int
    z: h5py.Dataset
    geometry_Cxyz: Tensor
    solid_fraction_xyz: Tensor
    copy: int = 0

    @property
    def snapshots(self) -> int:
        """Number of snapshots T."""
        return self.z.shape[0]

    def solid_fraction_by_token(self, patch: int) -> Tensor:
        """Fraction of solid voxels in each token, float32 [x / patch, y / patch, z / patch]."""
        return F.avg_pool3d(self.solid_fraction_xyz[None, None], patch)[0, 0]

    def mean_squared_change(self) -> float:
        """Mean square of z[t + 1] - z[t] over all t, channels and cells.

        Raises:
            UserError: the file is damaged.
        """
        with _readable(Path(self.z.file.filename)):
            stored = self.z.parent.attrs.get("mean_squared_change")
        return mean_squared_change(self.read()) if stored is None else float(stored)

    def read(self, start: int = 0, stop: int | None = None, slab: slice = WHOLE) -> Tensor:
        """Latents of snapshots ``start`` to ``stop - 1``, float32 [T, C, x, y, z].

        Args:
            slab: part of the x axis; nothing else is read from the disk.

        Raises:
            UserError: the file is damaged.
        """
        with _readable(Path(self.z.file.filename)):
            return torch.from_numpy(self.z[start:stop, :, slab])


def mean_squared_change(z_TCxyz: Tensor) -> float:
    """Mean square of z[t + 1] - z[t]; 0 for a single snapshot."""
    return float(z_TCxyz.double().diff(dim=0).square().mean()) if len(z_TCxyz) > 1 else 0.0


def load_latents(folder: Path, split: str, tokenizer: Path | None = None) -> list[LatentTrajectory]:
    """Open every cached trajectory of a split, ordered by name. The file stays open.

    Args:
        folder: the cache folder.
        split: ``train``, ``valid`` or ``test``.
        tokenizer: folder of the tokenizer that must have made the latents. If it is None or no longer holds a
            tokenizer, latents of any tokenizer are accepted.

    Raises:
        UserError: the cache is missing or damaged, another tokenizer made it (by hash, channels or grid), a trajectory
            has no snapshots, trajectories differ in shape, or a geometry is not finite.
    """
    path = folder / f"{split}.hdf5"
    with _readable(path):
        file = h5py.File(path, "r")
        found = [_trajectory(file[name]) for name in sorted(file)]
        shapes = [(one.z.shape[1:], tuple(one.geometry_Cxyz.shape), one.solid_fraction_xyz.shape) for one in found]
        made_with = str(file.attrs.get("tokenizer_sha256", "")), str(file.attrs.get("tokenizer", ""))
    remedy = f"delete {folder} and run `shodh tokenizer encode` again"
    if not found:
        raise UserError(f"latents {path} hold no trajectory: {remedy}")
    shape = shapes[0][0]
    for one, own in zip(found, shapes, strict=True):
        if len(shape) != 4 or own != (shape, shape, shape[1:]):
            raise UserError(
                f"latents {path}: {one.z.parent.name[1:]} has {_size(own[0])} and a geometry of {_size(own[1])}, "
                f"expected {_size(shape)} in all: {remedy}"
            )
        if not one.snapshots:
            raise UserError(f"latents {path}: {one.z.parent.name[1:]} has no snapshots: {remedy}")
        if not one.geometry_Cxyz.isfinite().all() or not one.solid_fraction_xyz.isfinite().all():
            raise UserError(f"latents {path}: the geometry of {one.z.parent.name[1:]} is not finite: {remedy}")
    if tokenizer:
        _require_made_with(tokenizer, made_with, shape, path, remedy)
    return found


def inputs_of_latents(folder: Path) -> Inputs:
    """Read what the training latents in a cache folder were made from, see `shodh_moe.config.inputs`.

    Raises:
        UserError: the cache is missing or damaged.
    """
    path = folder / "train.hdf5"
    with _readable(path), h5py.File(path, "r") as file:
        # numpy's numbers and arrays become plain ones, as a checkpoint stores them.
        return {key: np.asarray(file.attrs[key]).tolist() for key in NAMES if key in file.attrs}


def _trajectory(group: h5py.Group) -> LatentTrajectory:
    domain = str(group.attrs["domain"])
    if not is_name(domain):
        raise ValueError(f"domain {domain!r} is not {NAME_RULE}")
    return LatentTrajectory(
        domain=domain,
        source=str(group.attrs["source"]),
        sample=int(group.attrs["sample"]),
        z=group["z"],
        geometry_Cxyz=torch.from_numpy(group["geometry"][()]),
        solid_fraction_xyz=torch.from_numpy(group["solid_fraction"][()]),
        copy=int(group.attrs.get("copy", 0)),
    )


def _require_made_with(
    tokenizer: Path, made_with: tuple[str, str], shape: tuple[int, ...], path: Path, remedy: str
) -> None:
    """Check that the tokenizer in the folder, if there is one, made the latents.

    Args:
        made_with: hash and folder of the tokenizer that made the latents, as the cache records them.
        shape: [C, x, y, z] of the latents.

    Raises:
        UserError: hash or shape differ, or the tokenizer's description is damaged.
    """
    (digest, folder), meta_path = made_with, tokenizer / "tokenizer.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        own_digest = str(meta["sha256"])
        own_shape = (int(meta["config"]["latent_channels"]), *(int(size) // COMPRESSION for size in meta["grid"]))
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path} cannot be read ({type(error).__name__}): train the tokenizer again") from error
    if (digest, shape) != (own_digest, own_shape):
        theirs = f"tokenizer {digest[:12]} (then in {folder})" if digest else "an unknown tokenizer"
        raise UserError(
            f"latents {path}, {_size(shape)}, were made with {theirs}; the one in {tokenizer} is {own_digest[:12]} and "
            f"makes {_size(own_shape)}: {remedy}, or set tokenizer.path to the tokenizer that made them"
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} channels on {list(shape[1:])}" if shape else "no shape"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading HDF5 in the block into a `UserError` that says what to do."""
    try:
        yield
    # h5py raises different ones for an object of the wrong kind, such as a group instead of a dataset.
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read latents {path} ({reason}): delete {path.parent} and run again") from error


class Batch(NamedTuple):
    """Samples for one call of the transformer. Shapes: B samples, H history, C channels, x y z latent grid.

    Attributes:
        history_BHCxyz: the H latents before the target, the newest last.
        geometry_BCxyz: the geometry latents.
        target_BCxyz: the latents to predict.
        domain_B: int64, number of each sample's domain in `LatentSamples.domains`.
    """

    history_BHCxyz: Tensor
    geometry_BCxyz: Tensor
    target_BCxyz: Tensor
    domain_B: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Context]:
        """The arguments of `LatentTransformer.forward`."""
        return self.history_BHCxyz, self.geometry_BCxyz, Context(len(self.domain_B), self.domain_B)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move the samples to a device, and convert floating-point tensors to ``dtype`` (None keeps their dtypes)."""
        return Batch(*(x.to(device, dtype if x.is_floating_point() else None, non_blocking=True) for x in self))


class LatentSamples:
    """Samples of a split, grouped by domain. A sample is H latents, the geometry latent, and the next latent.

    Args:
        trajectories: latent trajectories of one split.
        history: H.
        weights: ``data.weights``; domains with weight 0 are left out.

    Attributes:
        domains: sorted names of the domains in use.
        trajectories: trajectories of the domains in use.
        index: for each domain, (trajectory number, first snapshot) of each sample.
        weights: weight of each domain in use, for `DomainSampler`; None if no weights are given.
        streams: number of each domain in use among all domains, which selects its random stream in `DomainSampler`.

    Raises:
        UserError: a weight is for an unknown domain, or no trajectory of a domain is long enough.
    """

    def __init__(self, trajectories: list[LatentTrajectory], history: int, weights: dict[str, float] | None = None):
        all_domains = sorted({trajectory.domain for trajectory in trajectories})
        all_weights = domain_weights(weights, all_domains)
        self.streams = tuple(n for n in range(len(all_domains)) if all_weights is None or all_weights[n] > 0)
        self.weights = tuple(all_weights[n] for n in self.streams) if all_weights else None
        self.domains = [all_domains[n] for n in self.streams]
        self.trajectories = [trajectory for trajectory in trajectories if trajectory.domain in self.domains]
        self.history = history
        self.index: list[list[tuple[int, int]]] = [[] for _ in self.domains]
        for number, trajectory in enumerate(self.trajectories):
            starts = range(trajectory.snapshots - history)
            self.index[self.domains.index(trajectory.domain)].extend((number, start) for start in starts)
        for domain, samples in zip(self.domains, self.index, strict=True):
            if not samples:
                raise UserError(f"no trajectory of domain {domain} has more than model.history = {history} snapshots")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples of each domain."""
        return tuple(len(samples) for samples in self.index)

    def change_scale(self) -> Tensor:
        """Mean squared change from snapshot to snapshot of each domain, divided by its mean over domains: float64 [D].

        Raises:
            UserError: the latents of a domain never change, or the file is damaged.
        """
        sums = torch.zeros(len(self.domains), 2, dtype=torch.float64)
        for trajectory in self.trajectories:
            changes = trajectory.snapshots - 1
            weighted = [trajectory.mean_squared_change() * changes, changes] if changes else [0.0, 0]
            sums[self.domains.index(trajectory.domain)] += torch.tensor(weighted, dtype=torch.float64)
        change_D = sums[:, 0] / sums[:, 1].clamp(min=1)
        if still := [name for name, change in zip(self.domains, change_D, strict=True) if not change > 0]:
            raise UserError(f"training.loss domain: the latents of {still[0]} never change: set training.loss to mse")
        return change_D / change_D.mean()

    def batch(self, samples: list[tuple[int, int]], slab: slice = WHOLE) -> Batch:
        """Read samples, given as (domain, index within the domain).

        Args:
            slab: part of the x axis to read.

        Raises:
            UserError: the file is damaged.
        """
        history, geometry, target = [], [], []
        for domain, index in samples:
            number, start = self.index[domain][index]
            trajectory = self.trajectories[number]
            z_TCxyz = trajectory.read(start, start + self.history + 1, slab)
            history.append(z_TCxyz[:-1])
            geometry.append(trajectory.geometry_Cxyz[:, slab])
            target.append(z_TCxyz[-1])
        labels = torch.tensor([domain for domain, _ in samples])
        return Batch(torch.stack(history), torch.stack(geometry), torch.stack(target), labels)

    def context(self, domain: str) -> Context:
        """Return the context of one sample of a domain, for `LatentTransformer.forward`."""
        return Context(1, torch.tensor([self.domains.index(domain)]))

    def windows_of(self, trajectory: LatentTrajectory) -> list[tuple[int, int]]:
        """Return (domain, index) of every sample of one of `trajectories`, in the order of its snapshots."""
        number = next(number for number, one in enumerate(self.trajectories) if one is trajectory)
        domain = self.domains.index(trajectory.domain)
        return [(domain, n) for n, (owner, _) in enumerate(self.index[domain]) if owner == number]

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Locate a sample (domain, file, trajectory, first snapshot), and check whether its values are finite."""
        number, start = self.index[domain][index]
        trajectory = self.trajectories[number]
        return {
            "domain": trajectory.domain,
            "file": trajectory.source,
            "trajectory": trajectory.sample,
            "first_snapshot": start,
            "finite": bool(torch.isfinite(trajectory.read(start, start + self.history + 1)).all()),
        }
