"""Write simulated trajectories in the_well's HDF5 schema, one trajectory per file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.files import atomic_file
from shodh_moe.solvers import Simulation

# Every file of a folder needs the same scalars: the loader of the_well stacks them.
SCALARS = ("viscosity", "target_speed", "reynolds", "mach")
_AXES = ("x", "y", "z")


def write_trajectory(
    path: Path, simulation: Simulation, *, dataset_name: str, domain: str, provenance: dict[str, Any]
) -> None:
    """Write one trajectory to ``path``; a file of that name is always complete.

    ``provenance`` values (numbers, text, booleans; anything else is stored as JSON) become the attributes of the
    group of that name, after which ``complete`` is set.

    Raises:
        UserError: the file cannot be written (disk full, no permission).
    """
    with atomic_file(path) as temporary, new_hdf5(temporary) as file:
        _write_root(file, simulation, dataset_name, domain)
        _write_dimensions(file, simulation)
        _write_boundaries(file, simulation)
        _write_fields(file, simulation)
        group = file.create_group("provenance")
        group.attrs["label"] = "synthetic"
        group.attrs["units"] = "lattice units: cell size, time step and mean density are 1"
        for key, value in provenance.items():
            group.attrs[key] = value if isinstance(value, (str, bool, int, float)) else json.dumps(value)
        group.attrs["complete"] = True


def _write_root(file: h5py.File, simulation: Simulation, dataset_name: str, domain: str) -> None:
    file.attrs["dataset_name"] = dataset_name
    file.attrs["grid_type"] = "cartesian"
    file.attrs["n_spatial_dims"] = 3
    file.attrs["n_trajectories"] = 1
    file.attrs["simulation_parameters"] = list(SCALARS)
    file.attrs["domain"] = domain
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


def _boundary(parent: h5py.Group, name: str, axis: str, size: int, kind: str, cells: list[int]) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["associated_dims"] = [axis]
    group.attrs["associated_fields"] = ["velocity", "pressure"]
    group.attrs["bc_type"] = kind
    _flag(group)
    mask = np.zeros(size, dtype=bool)
    mask[cells] = True
    group.create_dataset("mask", data=mask)
    return group


def _write_fields(file: h5py.File, simulation: Simulation) -> None:
    scalars = file.create_group("t0_fields")
    scalars.attrs["field_names"] = ["pressure", "solid"]
    _field(scalars, "pressure", simulation.pressure_TXYZ[None], time_varying=True)
    _field(scalars, "solid", simulation.solid_XYZ[None].astype(np.float32), time_varying=False)
    vectors = file.create_group("t1_fields")
    vectors.attrs["field_names"] = ["velocity"]
    _field(vectors, "velocity", np.moveaxis(simulation.velocity_T3XYZ, 1, -1)[None], time_varying=True)
    file.create_group("t2_fields").attrs["field_names"] = np.array([], dtype=h5py.string_dtype())


def _field(group: h5py.Group, name: str, values: np.ndarray, time_varying: bool) -> None:
    dataset = group.create_dataset(name, data=np.ascontiguousarray(values, dtype=np.float32))
    dataset.attrs["dim_varying"] = np.ones(3, dtype=bool)
    _flag(dataset, sample_varying=True, time_varying=time_varying)


def _flag(item: h5py.HLObject, sample_varying: bool = False, time_varying: bool = False) -> None:
    item.attrs["sample_varying"] = sample_varying
    item.attrs["time_varying"] = time_varying
