"""Read and validate trajectories in the_well's HDF5 schema, written by this project or by others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES, Boundaries, boundaries_of
from shodh_moe.base.errors import UserError
from shodh_moe.data.opening import flow_of, opened
from shodh_moe.data.unpacking import read_gzip
from shodh_moe.inspection.structure import why_unreadable

# Squares of larger values overflow float32. If bytes are swapped, every fourth value exceeds this.
LARGEST = 1e18


@dataclass(frozen=True)
class TrajectoryRecord:
    """One trajectory of a file.

    Attributes:
        path: the HDF5 file.
        sample: index of the trajectory in the file (0 in the files we write).
        domain: this project's domain name, or the_well's dataset_name for other files.
        n_snapshots: number of stored snapshots T.
        grid: (X, Y, Z).
        periodic: whether each axis is periodic, from the file's boundary conditions.
        forced: whether a force drives the flow along x; True if the file does not say.
        spacing: distance between cells along x, y, z in the file's units; None if unknown.
        interval: time between snapshots in the file's units; None if unknown.
        units: the units as stated in the file; "" if not stated.
        boundaries: kind of the low and the high face of each axis: ``wall``, ``open``, ``periodic`` or ``unknown``.
    """

    path: Path
    sample: int
    domain: str
    n_snapshots: int
    grid: tuple[int, int, int]
    periodic: tuple[bool, bool, bool] = (False, False, False)
    forced: bool = True
    spacing: tuple[float, float, float] | None = None
    interval: float | None = None
    units: str = ""
    boundaries: Boundaries = UNKNOWN_BOUNDARIES

    @property
    def nbytes(self) -> int:
        """Size of all snapshots as float32 [5, X, Y, Z]."""
        return 4 * 5 * self.n_snapshots * int(np.prod(self.grid))


@dataclass(frozen=True)
class Trajectory:
    """The fields of one trajectory, float32 and unnormalised.

    Attributes:
        record: the trajectory that was read.
        velocity_T3XYZ: [T, 3, X, Y, Z].
        pressure_T1XYZ: [T, 1, X, Y, Z].
        solid_1XYZ: [1, X, Y, Z], 1 in solid voxels, 0 in fluid.
    """

    record: TrajectoryRecord
    velocity_T3XYZ: NDArray[np.float32]
    pressure_T1XYZ: NDArray[np.float32]
    solid_1XYZ: NDArray[np.float32]


def open_trajectories(path: Path | str, grid: tuple[int, ...] | None = None) -> list[TrajectoryRecord]:
    """List the trajectories of a file from its header, without reading any field.

    Raises:
        UserError: the file is missing, empty, truncated, locked, damaged or not HDF5; links or refers to other
            files; has an attribute, dataset or chunk of excessive size; lacks velocity or pressure; has values of
            an unexpected type, inconsistent shapes, coordinates or times with unequal or non-positive steps, a filter
            that is not installed, values that were never written, or a grid other than ``grid``.
    """
    path = Path(path)
    flow = flow_of(path)
    shape = (flow["grid"][0], flow["grid"][1], flow["grid"][2])
    if grid is not None and shape != tuple(grid):
        raise UserError(f"{path} has grid {list(shape)}, not {list(grid)}: set data.grid to match or use other data")
    intervals = flow["intervals"] or [None] * flow["samples"]
    return [
        TrajectoryRecord(
            path=path,
            sample=sample,
            domain=flow["domain"],
            n_snapshots=flow["n_snapshots"],
            grid=shape,
            periodic=tuple(flow["periodic"]),
            forced=flow["forced"],
            spacing=tuple(flow["spacing"]) if flow["spacing"] else None,
            interval=interval,
            units=flow["units"],
            boundaries=boundaries_of(flow["boundaries"]),
        )
        for sample, interval in enumerate(intervals)
    ]


def read_snapshots(
    record: TrajectoryRecord, start: int = 0, stop: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read snapshots ``start`` to ``stop`` - 1 of one trajectory; by default all.

    Returns:
        Velocity and pressure [T, 4, X, Y, Z], and the solid mask [1, X, Y, Z], both float32.

    Raises:
        UserError: a chunk is damaged or has a wrong checksum, or a value is not finite or too large (names the field
            and the snapshot).
    """
    stop = record.n_snapshots if stop is None else stop
    fields_T4XYZ = np.empty((stop - start, 4, *record.grid), dtype=np.float32)
    with opened(record.path) as file:
        fields_T4XYZ[:, :3] = np.moveaxis(_read(file, "t1_fields/velocity", record, start, stop), -1, 1)
        fields_T4XYZ[:, 3] = _read(file, "t0_fields/pressure", record, start, stop)
        solid_1XYZ = _read_solid(file, record)
    require_sound(record, "velocity", fields_T4XYZ[:, :3], start)
    require_sound(record, "pressure", fields_T4XYZ[:, 3], start)
    return fields_T4XYZ, solid_1XYZ


def read_trajectory(record: TrajectoryRecord | Path | str, grid: tuple[int, ...] | None = None) -> Trajectory:
    """Read a whole trajectory (the first in the file, if given a path) and check every value.

    Raises:
        UserError: see `open_trajectories` and `read_snapshots`.
    """
    if not isinstance(record, TrajectoryRecord):
        record = open_trajectories(record, grid)[0]
    fields_T4XYZ, solid_1XYZ = read_snapshots(record)
    return Trajectory(record, fields_T4XYZ[:, :3], fields_T4XYZ[:, 3:], solid_1XYZ)


def read_provenance(path: Path | str) -> dict[str, object]:
    """Read the provenance attributes of a file, with JSON values decoded; {} if it has none or is incomplete.

    Raises:
        UserError: as in `opening.opened`.
    """
    with opened(Path(path)) as file:
        if "provenance" not in file or not file["provenance"].attrs.get("complete", False):
            return {}
        return {key: _decoded(value) for key, value in file["provenance"].attrs.items()}


def read_times(record: TrajectoryRecord) -> NDArray[np.float64] | None:
    """Read the times of a trajectory's snapshots, [T]; None if the file has none.

    Raises:
        UserError: as in `opening.opened`.
    """
    with opened(record.path) as file:
        if "dimensions/time" not in file:
            return None
        time = np.asarray(file["dimensions/time"], dtype=np.float64)
    return time[record.sample] if time.ndim == 2 else time


def stated_units(record: TrajectoryRecord) -> dict[str, str]:
    """Return the units that a file states of velocity, pressure, length and time; those that it does not are missing.

    Raises:
        UserError: as in `opening.opened`.
    """
    lattice = {"velocity": "cells / time step", "pressure": "lattice units", "length": "cells", "time": "time steps"}
    units = dict(lattice) if record.units.startswith("lattice") else {}
    stated = read_provenance(record.path)
    return units | {name: str(stated[f"unit_{name}"]) for name in lattice if f"unit_{name}" in stated}


def _decoded(value: object) -> object:
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.item() if isinstance(value, np.generic) else value


def _read(file: h5py.File, name: str, record: TrajectoryRecord, start: int, stop: int) -> NDArray[np.float32]:
    """Read snapshots of a field, float32 [stop - start, X, Y, Z] or [stop - start, X, Y, Z, 3]."""
    dataset = file[name]
    try:
        values_T = _values(dataset, record.sample, start, stop)
    except OSError as error:
        raise UserError(f"{record.path}: {_unreadable(dataset, name, record.sample, start, stop, error)}") from error
    with np.errstate(over="ignore"):  # too large float64 values become infinity, which is refused
        return np.asarray(values_T, dtype=np.float32)


def _values(dataset: h5py.Dataset, sample: int, start: int, stop: int) -> NDArray[np.generic]:
    if dataset.compression == "gzip":
        return read_gzip(dataset, (sample, start), (sample + 1, stop))[0]
    return dataset[sample, start:stop]


def _unreadable(dataset: h5py.Dataset, name: str, sample: int, start: int, stop: int, error: OSError) -> str:
    """Name the unreadable snapshot, and the reason if HDF5 reports one."""
    for snapshot in range(start, stop):
        try:
            _values(dataset, sample, snapshot, snapshot + 1)
        except OSError:
            break
    why = why_unreadable(dataset, error)
    return f"{name} of snapshot {snapshot} cannot be read, {why}: copy or generate the file again"


def _read_solid(file: h5py.File, record: TrajectoryRecord) -> NDArray[np.float32]:
    if "t0_fields/solid" not in file:
        return np.zeros((1, *record.grid), dtype=np.float32)
    solid = file["t0_fields/solid"]
    try:
        if solid.compression == "gzip":
            first, after = ((record.sample,), (record.sample + 1,)) if solid.ndim == 4 else ((), ())
            values_XYZ = read_gzip(solid, first, after).reshape(record.grid)
        else:
            values_XYZ = solid[record.sample] if solid.ndim == 4 else solid[:]
    except OSError as error:
        why = why_unreadable(solid, error)
        raise UserError(f"{record.path}: t0_fields/solid cannot be read, {why}: copy or generate it again") from error
    with np.errstate(over="ignore"):
        solid_1XYZ = np.asarray(values_XYZ, dtype=np.float32)[None]
    if not np.isfinite(solid_1XYZ).all():
        raise UserError(f"{record.path}: solid has values that are not finite: generate or convert the file again")
    return solid_1XYZ


def require_sound(record: TrajectoryRecord, field: str, values_T: NDArray[np.float32], start: int) -> None:
    """Check that values [T, ...] of snapshots from ``start`` on are finite and below `LARGEST`.

    Raises:
        UserError: a value fails the check; names the field and the first bad snapshot.
    """
    # max and min propagate NaN and need no temporary array.
    if values_T.max(initial=0) < LARGEST and values_T.min(initial=0) > -LARGEST:
        return
    for snapshot, values in enumerate(values_T, start):
        if not np.isfinite(values).all():
            what = "has values that are not finite: remove the file or generate it again"
        elif abs(values).max() >= LARGEST:
            what = f"has values up to {abs(values).max():.3g}: their bytes may be swapped; convert the file again"
        else:
            continue
        raise UserError(f"{record.path}: {field} of snapshot {snapshot} {what}")
