"""Write simulated trajectories in the_well's HDF5 schema, one per file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh_moe.base.files import atomic_file
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.readback import require_as_written
from shodh_moe.data.storage import CONCENTRATION, layout
from shodh_moe.data.well_parts import AXES, FIELDS, add_boundary, mark_field, mark_varying, text_array, write_provenance
from shodh_moe.solvers import Simulation

# Every file of a folder needs the same scalars: the loader of the_well stacks them.
SCALARS = ("viscosity", "target_speed", "reynolds", "mach")
UNITS = "lattice units: cell size, time step and mean density are 1"


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
            write_provenance(file, {"label": "synthetic", "units": UNITS, **provenance})
            file["provenance"].attrs["complete"] = True
        require_as_written(temporary, simulation, path)


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
        mark_varying(group.create_dataset(name, data=value))


def _write_dimensions(file: h5py.File, simulation: Simulation) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(AXES)
    mark_varying(group.create_dataset("time", data=simulation.time_T), time_varying=True)
    for axis, size in zip(AXES, simulation.solid_XYZ.shape, strict=True):
        mark_varying(group.create_dataset(axis, data=np.arange(size, dtype=np.float32) + np.float32(0.5)))


def _write_boundaries(file: h5py.File, simulation: Simulation) -> None:
    group = file.create_group("boundary_conditions")
    for axis, size in zip(AXES, simulation.solid_XYZ.shape, strict=True):
        if axis == "z" and simulation.lid:
            # The schema knows only walls; the slip attribute is ours and tells the lid from the bed.
            add_boundary(group, "z_wall_bed", axis, size, "WALL", [0]).attrs["slip"] = "no slip"
            add_boundary(group, "z_wall_lid", axis, size, "WALL", [-1]).attrs["slip"] = "free slip"
        else:
            add_boundary(group, f"{axis}_periodic", axis, size, "PERIODIC", [0, -1])
    if simulation.scalar_TXYZ is not None:
        for boundary in group.values():
            boundary.attrs["associated_fields"] = [*FIELDS, CONCENTRATION]


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
    file.create_group("t2_fields").attrs["field_names"] = text_array([])


def _field(group: h5py.Group, name: str, values: np.ndarray, time_varying: bool, compression: str | None) -> None:
    data = np.ascontiguousarray(values, dtype=np.float32)
    options = layout(data.shape, 2 if time_varying else 1, compression)
    mark_field(group.create_dataset(name, data=data, **options), time_varying)
