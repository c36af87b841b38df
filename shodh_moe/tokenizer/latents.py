"""Read the cached latents of a dataset, one trajectory at a time or as training samples.

`encoding` encodes a dataset once, so that pretraining never runs the encoder. A cache folder holds ``train.hdf5``,
``valid.hdf5`` and ``test.hdf5``. Each file has one group per trajectory with ``z`` [T, C, x, y, z] and ``geometry``
[C, x, y, z] (normalised latents, float32), ``solid_fraction`` [x, y, z] (fraction of solid voxels in each latent's
patch, float32) and the attributes ``domain``, ``source`` (data file), ``sample`` (number of the trajectory in that
file), ``copy`` (0: the trajectory itself), ``mean_squared_change`` (of z from snapshot to snapshot; absent in older
caches), ``boundaries`` (codes of the faces, see `shodh_moe.base.boundaries`; absent in older caches) and the symmetry
of the copy: ``shift``, ``mirror``, ``order``.

The attributes of the file record the latents' origin: ``tokenizer_sha256`` (of all weights and statistics),
``tokenizer`` (its folder), ``dataset`` (its folder), ``stats_sha256`` (of the dataset's statistics), ``grid`` (of the
fields), ``latent_channels``, ``copies``, ``symmetries``, ``seed`` and, except in older caches, ``data`` (identity of
the dataset), ``data_version`` (of generated data) and ``latents_version`` (of the code).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.boundaries import UNKNOWN_CODE
from shodh_moe.base.errors import UserError
from shodh_moe.base.tensors import sent
from shodh_moe.base.text import NAME_RULE, is_name
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.inputs import NAMES, Inputs
from shodh_moe.config.window import Window
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
        boundary_32: int64, codes of the faces of the box, see `shodh_moe.base.boundaries`; None in older caches.
    """

    domain: str
    source: str
    sample: int
    z: h5py.Dataset
    geometry_Cxyz: Tensor
    solid_fraction_xyz: Tensor
    copy: int = 0
    boundary_32: Tensor | None = None

    @property
    def snapshots(self) -> int:
        """Number of snapshots T."""
        return self.z.shape[0]

    def solid_fraction_by_token(self, patch: int) -> Tensor:
        """Fraction of solid voxels in each token, float32 [x / patch, y / patch, z / patch]."""
        return F.avg_pool3d(self.solid_fraction_xyz[None, None], patch)[0, 0]

    def boundaries(self) -> Tensor:
        """``boundary_32``, or codes of unknown faces in older caches."""
        return torch.full((3, 2), UNKNOWN_CODE) if self.boundary_32 is None else self.boundary_32

    def mean_squared_change(self) -> float:
        """Mean square of z[t + 1] - z[t] over all t, channels and cells.

        Raises:
            UserError: the file is damaged.
        """
        with _readable(Path(self.z.file.filename)):
            stored = self.z.parent.attrs.get("mean_squared_change")
        return mean_squared_change(self.read()) if stored is None else float(stored)

    def read(self, start: int = 0, stop: int | None = None, step: int = 1, slab: slice = WHOLE) -> Tensor:
        """Latents of every ``step``-th snapshot from ``start`` to ``stop - 1``, float32 [T, C, x, y, z].

        Args:
            slab: part of the x axis; nothing else is read from the disk.

        Raises:
            UserError: the file is damaged.
        """
        with _readable(Path(self.z.file.filename)):
            return torch.from_numpy(self.z[start:stop:step, :, slab])


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
        UserError: the cache is missing or damaged, another tokenizer made it (by hash or channels), a trajectory
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


def require_boundaries(samples: LatentSamples, model: ModelConfig) -> None:
    """Check that the latents of a network that is told boundaries record them.

    Raises:
        UserError: an earlier version made them.
    """
    if model.told_boundaries and any(one.boundary_32 is None for one in samples.trajectories):
        path = Path(samples.trajectories[0].z.file.filename)
        key = "boundaries" if model.boundaries else "positions"
        raise UserError(
            f"latents {path} are of an earlier version and do not record the boundaries that model.{key} needs: delete "
            f"{path.parent} and run `shodh tokenizer encode` again"
        )


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
        boundary_32=_boundaries(group),
    )


def _boundaries(group: h5py.Group) -> Tensor | None:
    codes = group.attrs.get("boundaries")
    return None if codes is None else torch.from_numpy(np.asarray(codes, dtype=np.int64).reshape(3, 2))


def _require_made_with(
    tokenizer: Path, made_with: tuple[str, str], shape: tuple[int, ...], path: Path, remedy: str
) -> None:
    """Check that the tokenizer in the folder, if there is one, made the latents.

    Args:
        made_with: hash and folder of the tokenizer that made the latents, as the cache records them.
        shape: [C, x, y, z] of the latents.

    Raises:
        UserError: hash or channels differ, or the tokenizer's description is damaged.
    """
    (digest, folder), meta_path = made_with, tokenizer / "tokenizer.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        own_digest = str(meta["sha256"])
        own_channels = int(meta["config"]["latent_channels"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path} cannot be read ({type(error).__name__}): train the tokenizer again") from error
    if (digest, shape[0]) != (own_digest, own_channels):
        theirs = f"tokenizer {digest[:12]} (then in {folder})" if digest else "an unknown tokenizer"
        raise UserError(
            f"latents {path}, {shape[0]} channels, were made with {theirs}; the one in {tokenizer} is "
            f"{own_digest[:12]} and makes {own_channels}: {remedy}, or set tokenizer.path to their own tokenizer"
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
    """Samples for one call of the transformer.

    Shapes: B samples, H history, U predictions, C channels, x y z latent grid.

    Attributes:
        history_BHCxyz: the H latents before the target, the newest last.
        geometry_BCxyz: the geometry latents.
        targets_BUCxyz: the latents to predict, one after the other.
        domain_B: int64, number of each sample's domain in `LatentSamples.domains`.
        stride_B: int64, each sample's time stride.
        boundary_B32: int64, codes of the faces of each sample's box, see `shodh_moe.base.boundaries`.
    """

    history_BHCxyz: Tensor
    geometry_BCxyz: Tensor
    targets_BUCxyz: Tensor
    domain_B: Tensor
    stride_B: Tensor
    boundary_B32: Tensor

    @property
    def target_BCxyz(self) -> Tensor:
        """The first latents to predict."""
        return self.targets_BUCxyz[:, 0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Context]:
        """The arguments of `LatentTransformer.forward`."""
        samples = len(self.domain_B)
        context = Context(samples, self.domain_B, stride_B=self.stride_B, boundary_B32=self.boundary_B32)
        return self.history_BHCxyz, self.geometry_BCxyz, context

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move the samples to a device, and convert floating-point tensors to ``dtype`` (None keeps their dtypes)."""
        return Batch(*(sent(x, device, dtype if x.is_floating_point() else None) for x in self))


class LatentSamples:
    """Samples of a split, grouped by domain. A sample is H latents, the geometry latent, and the next U latents.

    A sample begins at any snapshot from which the smallest stride fits into the trajectory; larger ones may not.

    Args:
        trajectories: latent trajectories of one split.
        history: H.
        weights: ``data.weights``; domains with weight 0 are left out.
        strides: distances between the snapshots of a sample, in increasing order.
        ahead: U.

    Attributes:
        domains: sorted names of the domains in use.
        trajectories: trajectories of the domains in use.
        index: for each domain, (trajectory number, first snapshot) of each sample.
        weights: weight of each domain in use, for `DomainSampler`; None if no weights are given.
        streams: number of each domain in use among all domains, which selects its random stream in `DomainSampler`.

    Raises:
        UserError: a weight is for an unknown domain, or no trajectory of a domain is long enough for all strides.
    """

    def __init__(
        self,
        trajectories: list[LatentTrajectory],
        history: int,
        weights: dict[str, float] | None = None,
        strides: Sequence[int] = (1,),
        ahead: int = 1,
    ):
        all_domains = sorted({trajectory.domain for trajectory in trajectories})
        all_weights = domain_weights(weights, all_domains)
        self.streams = tuple(n for n in range(len(all_domains)) if all_weights is None or all_weights[n] > 0)
        self.weights = tuple(all_weights[n] for n in self.streams) if all_weights else None
        self.domains = [all_domains[n] for n in self.streams]
        self.trajectories = [trajectory for trajectory in trajectories if trajectory.domain in self.domains]
        self.history, self.ahead, self.strides = history, ahead, list(strides)
        self.index: list[list[tuple[int, int]]] = [[] for _ in self.domains]
        shortest, longest = (Window(history, ahead, stride) for stride in (strides[0], strides[-1]))
        for number, trajectory in enumerate(self.trajectories):
            starts = range(trajectory.snapshots - shortest.snapshots + 1)
            self.index[self.domains.index(trajectory.domain)].extend((number, start) for start in starts)
        for domain in self.domains:
            most = max(one.snapshots for one in self.trajectories if one.domain == domain)
            if most < longest.snapshots:
                raise UserError(
                    f"no trajectory of domain {domain} has the {longest.snapshots} snapshots that {longest} needs, the "
                    f"longest has {most}: lower that, or give longer trajectories"
                )

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

    def fitting_strides(self, domain: int, index: int) -> list[int]:
        """Return the strides with which a sample fits into its trajectory, in increasing order."""
        number, start = self.index[domain][index]
        room = self.trajectories[number].snapshots - start
        return [stride for stride in self.strides if Window(self.history, self.ahead, stride).snapshots <= room]

    def batch(self, samples: list[tuple[int, int]], strides: Sequence[int] | None = None, slab: slice = WHOLE) -> Batch:
        """Read samples, given as (domain, index within the domain).

        Args:
            strides: the stride of each sample, one of its `fitting_strides`; None: the smallest of all.
            slab: part of the x axis to read.

        Raises:
            UserError: the file is damaged.
        """
        strides = [self.strides[0]] * len(samples) if strides is None else strides
        history, geometry, targets, boundary = [], [], [], []
        for (domain, index), stride in zip(samples, strides, strict=True):
            number, start = self.index[domain][index]
            trajectory = self.trajectories[number]
            stop = start + Window(self.history, self.ahead, stride).snapshots
            z_TCxyz = trajectory.read(start, stop, stride, slab)
            history.append(z_TCxyz[: self.history])
            geometry.append(trajectory.geometry_Cxyz[:, slab])
            targets.append(z_TCxyz[self.history :])
            boundary.append(trajectory.boundaries())
        return Batch(
            torch.stack(history),
            torch.stack(geometry),
            torch.stack(targets),
            torch.tensor([domain for domain, _ in samples]),
            torch.tensor(strides),
            torch.stack(boundary),
        )

    def context(self, trajectory: LatentTrajectory) -> Context:
        """Return the context of a trajectory's samples, one at a time and with the smallest stride, for the network."""
        domain_B, stride_B = torch.tensor([self.domains.index(trajectory.domain)]), torch.tensor(self.strides[:1])
        return Context(1, domain_B, stride_B=stride_B, boundary_B32=trajectory.boundaries()[None])

    def windows_of(self, trajectory: LatentTrajectory) -> list[tuple[int, int]]:
        """Return (domain, index) of every sample of one of `trajectories`, in the order of its snapshots."""
        number = next(number for number, one in enumerate(self.trajectories) if one is trajectory)
        domain = self.domains.index(trajectory.domain)
        return [(domain, n) for n, (owner, _) in enumerate(self.index[domain]) if owner == number]

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Locate a sample (domain, file, trajectory, first snapshot), and check whether its values are finite.

        With several strides, those are the values of the largest one and all between them.
        """
        longest = Window(self.history, self.ahead, self.strides[-1])
        number, start = self.index[domain][index]
        trajectory = self.trajectories[number]
        return {
            "domain": trajectory.domain,
            "file": trajectory.source,
            "trajectory": trajectory.sample,
            "first_snapshot": start,
            "finite": bool(torch.isfinite(trajectory.read(start, start + longest.snapshots)).all()),
        }


def samples_of(config: Config, trajectories: list[LatentTrajectory], split: str) -> LatentSamples:
    """The samples of a split that a config asks for: for training (``train``), or for measuring at one stride.

    Raises:
        UserError: see `LatentSamples`.
    """
    if split == "train":
        strides, ahead = config.model.strides, config.training.unroll
        return LatentSamples(trajectories, config.model.history, config.data.weights, strides, ahead)
    return LatentSamples(trajectories, config.model.history, config.data.weights, [config.measured_stride])
