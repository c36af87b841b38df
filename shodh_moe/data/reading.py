"""Read trajectories from the_well's HDF5 schema, ours and others', and refuse what is wrong with them by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.errors import UserError


@dataclass(frozen=True)
class TrajectoryRecord:
    """One trajectory of a file.

    Attributes:
        path: the HDF5 file.
        sample: which trajectory of the file (0 in the files we write).
        domain: our domain name; for other files the_well's dataset_name.
        n_snapshots: stored snapshots T.
        grid: (X, Y, Z).
        periodic: along which axes the flow repeats itself, from the file's boundary conditions.
    """

    path: Path
    sample: int
    domain: str
    n_snapshots: int
    grid: tuple[int, int, int]
    periodic: tuple[bool, bool, bool] = (False, False, False)

    @property
    def nbytes(self) -> int:
        """Bytes of the fields of all snapshots as float32 [5, X, Y, Z]."""
        return 4 * 5 * self.n_snapshots * int(np.prod(self.grid))


@dataclass(frozen=True)
class Trajectory:
    """The fields of one trajectory, float32 and unnormalised.

    Attributes:
        record: where it came from.
        velocity_T3XYZ: [T, 3, X, Y, Z].
        pressure_T1XYZ: [T, 1, X, Y, Z].
        solid_1XYZ: [1, X, Y, Z], 1 in solid voxels, 0 in fluid.
    """

    record: TrajectoryRecord
    velocity_T3XYZ: NDArray[np.float32]
    pressure_T1XYZ: NDArray[np.float32]
    solid_1XYZ: NDArray[np.float32]


def open_trajectories(path: Path | str, grid: tuple[int, ...] | None = None) -> list[TrajectoryRecord]:
    """The trajectories of a file, from its header: no field is read.

    Raises:
        UserError: the file is missing, empty, truncated, not HDF5, lacks velocity or pressure, has shapes that do not
            fit together, or a grid other than ``grid``.
    """
    path = Path(path)
    with _opened(path) as file:
        return _records(path, file, grid)


def read_snapshots(
    record: TrajectoryRecord, start: int = 0, stop: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Snapshots start..stop of one trajectory: (fields_T4XYZ = velocity, pressure; solid_1XYZ), float32.

    Raises:
        UserError: the file is damaged, or a value is not finite (names the field and the snapshot).
    """
    stop = record.n_snapshots if stop is None else stop
    with _opened(record.path) as file:
        velocity_TXYZ3 = _read(file["t1_fields/velocity"], record, start, stop)
        pressure_TXYZ = _read(file["t0_fields/pressure"], record, start, stop)
        solid_1XYZ = _read_solid(file, record)
    fields_T4XYZ = np.empty((stop - start, 4, *record.grid), dtype=np.float32)
    fields_T4XYZ[:, :3] = np.moveaxis(velocity_TXYZ3, -1, 1)
    fields_T4XYZ[:, 3] = pressure_TXYZ
    _require_finite(record, "velocity", fields_T4XYZ[:, :3], start)
    _require_finite(record, "pressure", fields_T4XYZ[:, 3], start)
    return fields_T4XYZ, solid_1XYZ


def read_trajectory(record: TrajectoryRecord | Path | str, grid: tuple[int, ...] | None = None) -> Trajectory:
    """Read a whole trajectory (the first of a file, if given a path) and check every value.

    Raises:
        UserError: see `open_trajectories` and `read_snapshots`.
    """
    if not isinstance(record, TrajectoryRecord):
        record = open_trajectories(record, grid)[0]
    fields_T4XYZ, solid_1XYZ = read_snapshots(record)
    return Trajectory(record, fields_T4XYZ[:, :3], fields_T4XYZ[:, 3:], solid_1XYZ)


def read_provenance(path: Path | str) -> dict[str, object]:
    """The provenance attributes of a file we wrote, JSON values decoded; {} if it has none or is not complete."""
    with _opened(Path(path)) as file:
        if "provenance" not in file or not file["provenance"].attrs.get("complete", False):
            return {}
        return {key: _decoded(value) for key, value in file["provenance"].attrs.items()}


def _decoded(value: object) -> object:
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path or generate the data again")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of one HDF5 file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or generate it again")
    if not h5py.is_hdf5(path):
        raise UserError(f"{path} is not an HDF5 file: remove it from the folder or convert it to the_well's format")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else f"damaged or unreadable ({str(error).splitlines()[0]})"
        raise UserError(f"{path} is {reason}: copy or generate it again") from error


def _records(path: Path, file: h5py.File, grid: tuple[int, ...] | None) -> list[TrajectoryRecord]:
    dims = int(file.attrs.get("n_spatial_dims", 3))
    if dims != 3:
        raise UserError(f"{path} has {dims} spatial dimensions: only 3D trajectories can be read")
    velocity = _dataset(path, file, "t1_fields/velocity", 6)
    pressure = _dataset(path, file, "t0_fields/pressure", 5)
    if velocity.shape[-1] != 3 or velocity.shape[:-1] != pressure.shape:
        raise UserError(
            f"{path}: velocity {velocity.shape} and pressure {pressure.shape} do not fit together; expected "
            "[trajectories, snapshots, X, Y, Z, 3] and [trajectories, snapshots, X, Y, Z]: convert the file again"
        )
    samples, n_snapshots, *cells = pressure.shape
    if min(pressure.shape) == 0:
        raise UserError(f"{path} holds no data (pressure has shape {pressure.shape}): generate it again")
    if "t0_fields/solid" in file:
        solid = file["t0_fields/solid"]
        wanted = (samples, *cells) if solid.ndim == 4 else tuple(cells)
        if solid.shape != wanted:
            raise UserError(f"{path}: solid has shape {solid.shape}, expected {wanted}: convert the file again")
    shape = (cells[0], cells[1], cells[2])
    if grid is not None and shape != tuple(grid):
        raise UserError(f"{path} has grid {list(shape)}, not {list(grid)}: set data.grid to match or use other data")
    domain = str(file.attrs.get("domain", file.attrs.get("dataset_name", path.parent.name)))
    periodic = _periodic(file)
    return [TrajectoryRecord(path, sample, domain, n_snapshots, shape, periodic) for sample in range(samples)]


def _periodic(file: h5py.File) -> tuple[bool, bool, bool]:
    """Axes with a PERIODIC boundary condition; none where the file says nothing."""
    axes = [str(name) for name in file["dimensions"].attrs.get("spatial_dims", [])] if "dimensions" in file else []
    wraps = {
        str(axis)
        for group in file.get("boundary_conditions", {}).values()
        if str(group.attrs.get("bc_type", "")).upper() == "PERIODIC"
        for axis in group.attrs.get("associated_dims", [])
    }
    x, y, z = (axis in wraps for axis in axes) if len(axes) == 3 else (False, False, False)
    return x, y, z


def _dataset(path: Path, file: h5py.File, name: str, ndim: int) -> h5py.Dataset:
    if name not in file or not isinstance(file[name], h5py.Dataset):
        raise UserError(f"{path} has no {name}: it is not a flow trajectory in the_well's format")
    dataset = file[name]
    if dataset.ndim != ndim:
        raise UserError(
            f"{path}: {name} has {dataset.ndim} axes (shape {dataset.shape}), expected {ndim}: convert the file again"
        )
    return dataset


def _read(dataset: h5py.Dataset, record: TrajectoryRecord, start: int, stop: int) -> NDArray[np.float32]:
    return np.asarray(dataset[record.sample, start:stop], dtype=np.float32)


def _read_solid(file: h5py.File, record: TrajectoryRecord) -> NDArray[np.float32]:
    if "t0_fields/solid" not in file:
        return np.zeros((1, *record.grid), dtype=np.float32)
    solid = file["t0_fields/solid"]
    solid_XYZ = np.asarray(solid[record.sample] if solid.ndim == 4 else solid[:], dtype=np.float32)
    if not np.isfinite(solid_XYZ).all():
        raise UserError(f"{record.path}: solid has values that are not finite: generate or convert the file again")
    return solid_XYZ[None]


def _require_finite(record: TrajectoryRecord, field: str, values_T: NDArray[np.float32], start: int) -> None:
    good_T = np.isfinite(values_T).reshape(len(values_T), -1).all(axis=1)
    if not good_T.all():
        snapshot = start + int(np.argmin(good_T))
        raise UserError(
            f"{record.path}: {field} of snapshot {snapshot} has values that are not finite: "
            "remove the file or generate it again"
        )
