"""Make the data of a family, one HDF5 file per regime, and read them as tensors.

The planar solvers generate the data of a built-in family; those of a user's regimes are copied from the user's files.

Files are ``<folder>/<family>/<split>/s<coordinate>.hdf5``. They are like PDEBench's ``tensor`` files except that
channels come before space: ``tensor`` [N, T, C, H, W] float32, ``x-coordinate``, ``y-coordinate``, ``t-coordinate``.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file, remove_leftovers, require_writable
from shodh_moe.base.lock import making
from shodh_moe.base.progress import progress as default_progress
from shodh_moe.ccm.family import SOLVERS, SPLITS, Family, require_sound, simulate
from shodh_moe.ccm.family_config import every_snapshot
from shodh_moe.ccm.regime_folder import RegimeFolder
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.solvers import DivergedError, trajectory_seed
from shodh_moe.solvers.planar import PLANAR_VERSION
from shodh_moe.solvers.planar.navier_stokes import NavierStokes

# Trajectories solved together: enough to amortise a call, few enough to stay in a core's cache.
_BATCH = 16
_ATTRIBUTES = ("coordinate", "value", "dt", "channels")

Progress = Callable[..., Iterator[Any]]


@dataclass(frozen=True)
class Regime:
    """One file of a family.

    Attributes:
        split: name of its split.
        coordinate: s.
        value: the family's parameter at s.
        path: the file, which may not exist yet.
        request: everything that the file's content depends on; stored in the file.
    """

    split: str
    coordinate: float
    value: float
    path: Path
    request: dict[str, Any]


@dataclass(frozen=True)
class Trajectories:
    """The content of a file.

    Attributes:
        fields: [N, T, C, H, W] float32.
        coordinate, value: s and the family's parameter, the same for all N trajectories.
        interval: time between snapshots.
        channels: names of the C channels.
    """

    fields: torch.Tensor
    coordinate: float
    value: float
    interval: float
    channels: tuple[str, ...]


def regimes(family: Family, folder: Path) -> list[Regime]:
    """List the regimes of a family, split by split.

    Raises:
        UserError: the family is invalid.
    """
    require_sound(family)
    settings = {key: value for key, value in family.identity().items() if key not in ("coordinates", "trajectories")}
    files = family.settings if isinstance(family.settings, RegimeFolder) else None
    made_by: dict[str, Any] = {} if files else {"planar_version": PLANAR_VERSION}
    found = []
    for split in SPLITS:
        for coordinate in family.coordinates.get(split, ()):
            value = family.value(coordinate)
            if files:  # undo the rounding
                value = min(files.pieces, key=lambda one, value=value: abs(one - value))  # type: ignore[misc]
            request = {
                **made_by,
                "equation": type(family.settings).__name__,
                "split": split,
                "coordinate": coordinate,
                "value": value,
                "trajectories": family.count(split, value),
                **json.loads(json.dumps(settings)),
            }
            path = Path(folder) / family.name / split / f"s{coordinate:+.3f}.hdf5"
            found.append(Regime(split, coordinate, value, path, request))
    return found


def generate(
    family: Family,
    folder: Path,
    progress: Progress = default_progress,
    device: str | torch.device = "cpu",
    run: str = "",
) -> Path:
    """Make the files of ``family`` that are missing, damaged or of another request; return ``<folder>/<family>``.

    Solutions are computed in float64. On a CPU the bits depend neither on the batch nor on other regimes; other devices
    agree to rounding. ``progress`` is called as ``progress(iterable, desc, total)`` and must yield the items.

    If another process is generating the same folder, this waits for it and prints the name of its ``run``.

    Raises:
        UserError: the family is invalid, the disk is too small or not writable, a solution diverged, or a user's file
            is damaged.
    """
    home = Path(folder) / family.name
    wanted = regimes(family, folder)
    require_writable(home)
    with making(home, "data", run):
        for split in SPLITS:
            remove_leftovers(home / split)
        unfinished = [regime for regime in wanted if not is_done(regime)]
        _require_space(family, unfinished, home)
        files = (_make(family, regime, device) for regime in unfinished)
        for _ in progress(files, family.name.replace("_", " "), len(unfinished)):
            pass
    return home


def is_done(regime: Regime) -> bool:
    """Whether the file exists, is complete, and was made by the same request."""
    try:
        with h5py.File(regime.path, "r") as file:
            return _matches(file, regime)
    except (OSError, KeyError):
        return False


def read(path: Path, start: int = 0, stop: int | None = None) -> Trajectories:
    """Read trajectories ``start`` to ``stop`` (default: all) of one file.

    Raises:
        UserError: the file is missing, incomplete, not of a family, or has values that are not finite.
    """
    try:
        with h5py.File(path, "r") as file:
            if not file.attrs.get("complete", False) or any(name not in file.attrs for name in _ATTRIBUTES):
                raise UserError(f"{path} is not a complete file of a family: generate the data again")
            attributes = dict(file.attrs)
            fields = torch.from_numpy(np.asarray(file["tensor"][start:stop], dtype=np.float32))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: generate the data first") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and generate the data again") from error
    if not bool(torch.isfinite(fields).all()):
        raise UserError(f"{path} has values that are not finite: give finite ones, or generate the data again")
    return Trajectories(
        fields,
        float(attributes["coordinate"]),
        float(attributes["value"]),
        float(attributes["dt"]),
        tuple(str(name) for name in attributes["channels"]),
    )


def read_split(family: Family, folder: Path, split: str) -> list[Trajectories]:
    """Read all regimes of a split, in the order of ``family.coordinates[split]``.

    Raises:
        UserError: as in `read`; or a file was made by another request, or the split has no regimes.
    """
    found = []
    for regime in regimes(family, folder):
        if regime.split == split:
            if regime.path.exists() and not is_done(regime):
                raise UserError(f"{regime.path} is damaged or was made with other settings: generate the data again")
            found.append(read(regime.path))
    if not found:
        raise UserError(f"family {family.name} has no regimes in split {split!r}: choose from {', '.join(SPLITS)}")
    return found


def _make(family: Family, regime: Regime, device: str | torch.device) -> Path:
    make = _copied if isinstance(family.settings, RegimeFolder) else _solved
    fields = make(family, regime, device)
    with atomic_file(regime.path) as temporary, new_hdf5(temporary) as file:
        _write(file, family, regime, fields)
    return regime.path


def _solved(family: Family, regime: Regime, device: str | torch.device) -> np.ndarray:
    stream = f"{family.name}/{regime.split}/{regime.coordinate:+.3f}"
    seeds = [trajectory_seed(family.seed, stream, index) for index in range(family.trajectories[regime.split])]
    where = f"{family.name} at {family.parameter} {regime.value:g} (s = {regime.coordinate:g}, {regime.split})"
    parts = []
    for first in range(0, len(seeds), _BATCH):
        try:
            solution = simulate(family, seeds[first : first + _BATCH], regime.value, device)
        except DivergedError as error:
            raise UserError(f"{where}, trajectories from {first} on: {error}") from error
        parts.append(solution.float().cpu().numpy())
    return np.concatenate(parts)


def _copied(family: Family, regime: Regime, device: str | torch.device) -> np.ndarray:
    files = family.settings
    assert isinstance(files, RegimeFolder)
    every = every_snapshot(family.interval, files.interval)
    fields = files.read(regime.value, family.count(regime.split, regime.value))
    return fields[:, ::every][:, : family.snapshots].numpy()


def _write(file: h5py.File, family: Family, regime: Regime, tensor_NTCHW: np.ndarray) -> None:
    file.create_dataset("tensor", data=tensor_NTCHW)
    settings = family.settings
    if isinstance(settings, RegimeFolder):
        made_by = {"units": "those of the source", "label": "imported", "content": settings.content}
    else:
        made_by = {"units": "dimensionless", "label": "synthetic", "solver": SOLVERS[type(settings)].__name__}
        # On the torus, grid points start at the corner; the other two grids are cell centres around the origin.
        shift = 0.0 if isinstance(settings, NavierStokes) else 0.5 - family.grid / 2
        axis = (np.arange(family.grid) + shift) * settings.side / family.grid
        file["x-coordinate"] = file["y-coordinate"] = axis.astype(np.float32)
    file["t-coordinate"] = (np.arange(family.snapshots) * family.interval).astype(np.float32)
    file.attrs.update(
        family=family.name,
        split=regime.split,
        parameter=family.parameter,
        value=regime.value,
        coordinate=regime.coordinate,
        dt=family.interval,
        channels=np.array(family.channels, dtype=h5py.string_dtype()),
        seed=family.seed,
        request=json.dumps(regime.request, sort_keys=True),
        request_hash=_hash(regime.request),
        **made_by,
    )
    file.attrs["complete"] = True


def _matches(file: h5py.File, regime: Regime) -> bool:
    complete = bool(file.attrs.get("complete", False)) and "tensor" in file
    return complete and file.attrs.get("request_hash") == _hash(regime.request)


def _hash(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _require_space(family: Family, unfinished: list[Regime], home: Path) -> None:
    numbers = family.snapshots * len(family.channels) * math.prod(family.cells)
    needed = sum(4 * numbers * family.count(regime.split, regime.value) + 2**16 for regime in unfinished)
    existing = next(path for path in (home, *home.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"family {family.name} needs {needed / 1e9:.2f} GB but {existing} has {free / 1e9:.2f} GB free: "
            "choose another folder, or fewer trajectories, snapshots or grid cells"
        )
