"""Create files of predicted or decoded snapshots in the_well's HDF5 schema, with the rest copied from the input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.files import atomic_file
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import TrajectoryRecord
from shodh_moe.data.well_parts import AXES, mark_field, mark_varying, text_array, write_provenance

FACES = "velocity_face"
VELOCITY_SPREAD, PRESSURE_SPREAD = "velocity_spread", "pressure_spread"


@contextmanager
def new_prediction(
    path: Path,
    records: list[TrajectoryRecord],
    time: NDArray[np.float32],
    dtype: str,
    provenance: dict[str, Any],
    label: str = "prediction",
    faces: bool = False,
    spread: bool = False,
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
        spread: also create ``t1_fields/velocity_spread`` and ``t0_fields/pressure_spread``, the standard deviation over
            the members of an ensemble, for each component.

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
        scalars.attrs["field_names"] = file.attrs["simulation_parameters"] = text_array(names)
        fields = file.create_group("t0_fields")
        fields.attrs["field_names"] = names = ["pressure", PRESSURE_SPREAD] if spread else ["pressure"]
        for name in names:
            mark_field(fields.create_dataset(name, shape, dtype), time_varying=True)
        if "t0_fields/solid" in given:
            fields.attrs["field_names"] = [*names, "solid"]
            solid = np.asarray(given["t0_fields/solid"], dtype=np.float32)
            solid = solid[samples] if solid.ndim == 4 else solid
            mark_field(fields.create_dataset("solid", data=solid), time_varying=False, sample_varying=solid.ndim == 4)
        group = file.create_group("t1_fields")
        group.attrs["field_names"] = ["velocity", *[FACES] * faces, *[VELOCITY_SPREAD] * spread]
        for name in group.attrs["field_names"]:
            mark_field(group.create_dataset(name, (*shape, 3), dtype), time_varying=True)
        if faces:
            group[FACES].attrs["location"] = "component i at the centre of the lower face of its voxel along axis i"
        file.create_group("t2_fields").attrs["field_names"] = text_array([])
        units = given["provenance"].attrs.get("units") if "provenance" in given else None
        write_provenance(file, {"label": label, "units": str(units or "those of the input"), **provenance})
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
    mark_varying(group.create_dataset("time", data=time), sample_varying=time.ndim == 2, time_varying=True)
    for axis, size in zip(axes, grid, strict=True):
        stored = given.get(f"dimensions/{axis}")
        values = np.arange(size) + 0.5 if stored is None else stored[()]
        mark_varying(group.create_dataset(axis, data=np.asarray(values, dtype=np.float32)))


def axis_names(file: h5py.File) -> list[str]:
    """Names of the three spatial axes; x, y, z if the file does not name them."""
    names = file["dimensions"].attrs.get("spatial_dims", ()) if "dimensions" in file else ()
    return [str(name) for name in names] if len(names) == 3 else list(AXES)


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
                found[key] = text_array([_utf8(one) for one in value.flat]).reshape(value.shape)
        elif isinstance(value, str):
            found[key] = _utf8(value)
        elif isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufS"):
            found[key] = value
    return found


def _utf8(text: str) -> str:
    """Replace what was not UTF-8 in a file, because it cannot be written."""
    return text.encode("utf-8", "replace").decode("utf-8")


def unknown_fields(path: Path) -> list[str]:
    """Names of the fields in a file besides velocity, pressure, solid mask and those that `new_prediction` adds."""
    known = {"velocity", "pressure", "solid", FACES, VELOCITY_SPREAD, PRESSURE_SPREAD}
    with opened(path) as file:
        groups = [file[name] for name in ("t0_fields", "t1_fields", "t2_fields") if name in file]
        return [name for group in groups for name in group if name not in known]
