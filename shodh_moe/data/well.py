"""Write trajectories in the_well's HDF5 schema: simulated ones (one per file), predicted and decoded ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.files import atomic_file
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.readback import require_as_written
from shodh_moe.data.reading import TrajectoryRecord
from shodh_moe.data.storage import CONCENTRATION, layout
from shodh_moe.solvers import Simulation

# Every file of a folder needs the same scalars: the loader of the_well stacks them.
SCALARS = ("viscosity", "target_speed", "reynolds", "mach")
FIELDS = ("velocity", "pressure")
FACES = "velocity_face"
UNITS = "lattice units: cell size, time step and mean density are 1"
_AXES = ("x", "y", "z")


def write_trajectory(
    path: Path,
    simulation: Simulation,
    *,
    dataset_name: str,
    domain: str,
    provenance: dict[str, Any],
    compression: str | None = None,
) -> None:
    """Write one trajectory, read it back and compare; only a complete file appears at ``path``.

    Args:
        provenance: attributes of the group ``provenance``: numbers, text and booleans; other values are stored as
            JSON. ``complete`` is set last.
        compression: ``lzf``, ``gzip`` or None.

    Raises:
        UserError: the file cannot be written (disk full, no permission), or differs when read back.
    """
    with atomic_file(path) as temporary:
        with new_hdf5(temporary) as file:
            _write_root(file, simulation, dataset_name, domain)
            _write_dimensions(file, simulation)
            _write_boundaries(file, simulation)
            _write_fields(file, simulation, compression)
            _write_provenance(file, {"label": "synthetic", "units": UNITS, **provenance})
            file["provenance"].attrs["complete"] = True
        require_as_written(temporary, simulation, path)


@contextmanager
def new_prediction(
    path: Path,
    records: list[TrajectoryRecord],
    time: NDArray[np.float32],
    dtype: str,
    provenance: dict[str, Any],
    label: str = "prediction",
    faces: bool = False,
) -> Iterator[h5py.File]:
    """Create a file of predicted or decoded snapshots; it appears at ``path`` only if the block succeeds.

    Scalars, axes, boundary conditions and the solid mask are copied from the input, unless they vary with time.
    The block fills ``t1_fields/velocity`` [B, N, X, Y, Z, 3] and ``t0_fields/pressure`` [B, N, X, Y, Z].

    Args:
        records: the B trajectories to continue or decode, all from one file.
        time: times of the new snapshots, [N] or [B, N].
        dtype: dtype of velocity and pressure, ``float32`` or ``float64``.
        label: kind of snapshots, for the provenance.
        faces: also create ``t1_fields/velocity_face``, the velocity on the lower faces of the voxels.

    Raises:
        UserError: the file cannot be written (disk full, no permission).
    """
    samples, shape = [record.sample for record in records], (len(records), time.shape[-1], *records[0].grid)
    with h5py.File(records[0].path, "r") as given, atomic_file(path) as temporary, new_hdf5(temporary) as file:
        _copy_root(given, file, records)
        _copy_dimensions(given, file, time, records[0].grid)
        scalars, boundaries = (_copied_group(given, file, name) for name in ("scalars", "boundary_conditions"))
        for name, item in given.get("boundary_conditions", {}).items():
            if not item.attrs.get("time_varying", False):
                _copy(item, boundaries, name, samples)
        names = [n for n, item in given.get("scalars", {}).items() if not item.attrs.get("time_varying", False)]
        for name in names:
            _copy(given["scalars"][name], scalars, name, samples)
        scalars.attrs["field_names"] = file.attrs["simulation_parameters"] = _names(names)
        fields = file.create_group("t0_fields")
        fields.attrs["field_names"] = ["pressure"]
        _describe(fields.create_dataset("pressure", shape, dtype), time_varying=True)
        if "t0_fields/solid" in given:
            fields.attrs["field_names"] = ["pressure", "solid"]
            solid = np.asarray(given["t0_fields/solid"], dtype=np.float32)
            solid = solid[samples] if solid.ndim == 4 else solid
            _describe(fields.create_dataset("solid", data=solid), time_varying=False, sample_varying=solid.ndim == 4)
        group = file.create_group("t1_fields")
        group.attrs["field_names"] = ["velocity", FACES] if faces else ["velocity"]
        for name in group.attrs["field_names"]:
            _describe(group.create_dataset(name, (*shape, 3), dtype), time_varying=True)
        if faces:
            group[FACES].attrs["location"] = "component i at the centre of the lower face of its voxel along axis i"
        file.create_group("t2_fields").attrs["field_names"] = _names([])
        units = given["provenance"].attrs.get("units") if "provenance" in given else None
        _write_provenance(file, {"label": label, "units": str(units or "those of the input"), **provenance})
        yield file
        file["provenance"].attrs["complete"] = True


def _copy_root(given: h5py.File, file: h5py.File, records: list[TrajectoryRecord]) -> None:
    defaults = {"dataset_name": records[0].domain, "grid_type": "cartesian"}
    for key, value in {**defaults, **_attributes(given)}.items():
        file.attrs[key] = value
    file.attrs["n_spatial_dims"] = 3
    file.attrs["n_trajectories"] = len(records)


def _copy_dimensions(given: h5py.File, file: h5py.File, time: NDArray[np.float32], grid: tuple[int, ...]) -> None:
    group = _copied_group(given, file, "dimensions")
    group.attrs["spatial_dims"] = axes = axis_names(given)
    _flag(group.create_dataset("time", data=time), sample_varying=time.ndim == 2, time_varying=True)
    for axis, size in zip(axes, grid, strict=True):
        stored = given.get(f"dimensions/{axis}")
        values = np.arange(size) + 0.5 if stored is None else stored[()]
        _flag(group.create_dataset(axis, data=np.asarray(values, dtype=np.float32)))


def axis_names(file: h5py.File) -> list[str]:
    """Names of the three spatial axes; x, y, z if the file does not name them."""
    names = file["dimensions"].attrs.get("spatial_dims", ()) if "dimensions" in file else ()
    return [str(name) for name in names] if len(names) == 3 else list(_AXES)


def _copied_group(given: h5py.File, file: h5py.File, name: str) -> h5py.Group:
    group = file.create_group(name)
    for key, value in _attributes(given[name]).items() if name in given else ():
        group.attrs[key] = value
    return group


def _copy(item: h5py.HLObject, parent: h5py.Group, name: str, samples: list[int], by_sample: bool = False) -> None:
    """Copy a group or dataset with its attributes; if it varies by trajectory, only the trajectories ``samples``."""
    by_sample = bool(item.attrs.get("sample_varying", by_sample))
    if isinstance(item, h5py.Group):
        made = parent.create_group(name)
        for child, value in item.items():
            _copy(value, made, child, samples, by_sample)
    else:
        values = item[()]
        made = parent.create_dataset(name, data=values[samples] if by_sample and item.ndim else values)
    for key, value in _attributes(item).items():
        made.attrs[key] = value


def _attributes(item: h5py.HLObject) -> dict[str, Any]:
    """Attributes that can be copied: numbers, booleans and text, but not references."""
    found: dict[str, Any] = {}
    for key, value in item.attrs.items():
        if isinstance(value, np.ndarray) and value.dtype == object:
            if all(isinstance(one, str) for one in value.flat):
                found[key] = _names(value.tolist())
        elif isinstance(value, (str, np.generic)) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufS"):
            found[key] = value
    return found


def _names(names: list[str]) -> NDArray[Any]:
    return np.array(names, dtype=h5py.string_dtype())


def _write_provenance(file: h5py.File, provenance: dict[str, Any]) -> None:
    group = file.create_group("provenance")
    for key, value in provenance.items():
        group.attrs[key] = value if isinstance(value, (str, bool, int, float)) else json.dumps(value)


def _write_root(file: h5py.File, simulation: Simulation, dataset_name: str, domain: str) -> None:
    file.attrs["dataset_name"] = dataset_name
    file.attrs["grid_type"] = "cartesian"
    file.attrs["n_spatial_dims"] = 3
    file.attrs["n_trajectories"] = 1
    file.attrs["simulation_parameters"] = list(SCALARS)
    file.attrs["domain"] = domain
    file.attrs["forced"] = simulation.forced
    group = file.create_group("scalars")
    group.attrs["field_names"] = list(SCALARS)
    for name in SCALARS:
        value = np.float32(simulation.parameters[name])
        file.attrs[name] = value
        _flag(group.create_dataset(name, data=value))


def _write_dimensions(file: h5py.File, simulation: Simulation) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(_AXES)
    _flag(group.create_dataset("time", data=simulation.time_T), time_varying=True)
    for axis, size in zip(_AXES, simulation.solid_XYZ.shape, strict=True):
        _flag(group.create_dataset(axis, data=np.arange(size, dtype=np.float32) + np.float32(0.5)))


def _write_boundaries(file: h5py.File, simulation: Simulation) -> None:
    group = file.create_group("boundary_conditions")
    for axis, size in zip(_AXES, simulation.solid_XYZ.shape, strict=True):
        if axis == "z" and simulation.lid:
            # The schema knows only walls; the slip attribute is ours and tells the lid from the bed.
            _boundary(group, "z_wall_bed", axis, size, "WALL", [0]).attrs["slip"] = "no slip"
            _boundary(group, "z_wall_lid", axis, size, "WALL", [-1]).attrs["slip"] = "free slip"
        else:
            _boundary(group, f"{axis}_periodic", axis, size, "PERIODIC", [0, -1])
    if simulation.scalar_TXYZ is not None:
        for boundary in group.values():
            boundary.attrs["associated_fields"] = [*FIELDS, CONCENTRATION]


def _boundary(parent: h5py.Group, name: str, axis: str, size: int, kind: str, cells: list[int]) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["associated_dims"] = [axis]
    group.attrs["associated_fields"] = list(FIELDS)
    group.attrs["bc_type"] = kind
    _flag(group)
    mask = np.zeros(size, dtype=bool)
    mask[cells] = True
    group.create_dataset("mask", data=mask)
    return group


def _write_fields(file: h5py.File, simulation: Simulation, compression: str | None) -> None:
    scalars = file.create_group("t0_fields")
    _field(scalars, "pressure", simulation.pressure_TXYZ[None], True, compression)
    if simulation.scalar_TXYZ is not None:
        _field(scalars, CONCENTRATION, simulation.scalar_TXYZ[None], True, compression)
    _field(scalars, "solid", simulation.solid_XYZ[None], False, compression)
    scalars.attrs["field_names"] = [name for name in ("pressure", CONCENTRATION, "solid") if name in scalars]
    vectors = file.create_group("t1_fields")
    vectors.attrs["field_names"] = ["velocity"]
    _field(vectors, "velocity", np.moveaxis(simulation.velocity_T3XYZ, 1, -1)[None], True, compression)
    file.create_group("t2_fields").attrs["field_names"] = _names([])


def _field(group: h5py.Group, name: str, values: np.ndarray, time_varying: bool, compression: str | None) -> None:
    data = np.ascontiguousarray(values, dtype=np.float32)
    options = layout(data.shape, 2 if time_varying else 1, compression)
    _describe(group.create_dataset(name, data=data, **options), time_varying)


def _describe(dataset: h5py.Dataset, time_varying: bool, sample_varying: bool = True) -> None:
    dataset.attrs["dim_varying"] = np.ones(3, dtype=bool)
    _flag(dataset, sample_varying, time_varying)


def _flag(item: h5py.HLObject, sample_varying: bool = False, time_varying: bool = False) -> None:
    item.attrs["sample_varying"] = sample_varying
    item.attrs["time_varying"] = time_varying
