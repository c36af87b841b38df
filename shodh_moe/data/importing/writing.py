"""Create a trajectory file in the_well's schema, to be filled snapshot by snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.files import atomic_file
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.well_parts import AXES, add_boundary, mark_field, mark_varying, text_array, write_provenance


@dataclass(frozen=True)
class Header:
    """All data of a trajectory except for its fields.

    Attributes:
        dataset_name, domain: names of the dataset and of the kind of flow.
        time_step: time between snapshots; the first is at time 0.
        snapshots: number of snapshots.
        spacing: size of the cubic cells.
        ends: [low, high] boundary of each axis: both ``periodic``, or each ``wall``, ``free slip`` or ``open``.
        solid_XYZ: bool, True in solid voxels.
        scalars: constants of the flow.
    """

    dataset_name: str
    domain: str
    time_step: float
    snapshots: int
    spacing: float
    ends: list[list[str]]
    solid_XYZ: NDArray[np.bool_]
    scalars: dict[str, float]


@contextmanager
def new_trajectory_file(path: Path, header: Header) -> Iterator[tuple[h5py.File, dict[str, Any]]]:
    """Create a file with one trajectory; it appears at ``path`` only if the block succeeds.

    Yields the open file and a dictionary. The block fills ``t1_fields/velocity`` [1, T, X, Y, Z, 3] and
    ``t0_fields/pressure`` [1, T, X, Y, Z], float32, and the dictionary, which becomes the file's provenance.

    Raises:
        UserError: the file cannot be written (disk full, no permission).
    """
    provenance: dict[str, Any] = {}
    shape = (1, header.snapshots, *header.solid_XYZ.shape)
    with atomic_file(path) as temporary, new_hdf5(temporary) as file:
        _write_root(file, header)
        _write_dimensions(file, header)
        _write_boundaries(file, header)
        fields = file.create_group("t0_fields")
        fields.attrs["field_names"] = ["pressure", "solid"]
        mark_field(fields.create_dataset("pressure", shape, np.float32), time_varying=True)
        mark_field(fields.create_dataset("solid", data=header.solid_XYZ[None].astype(np.float32)), time_varying=False)
        vectors = file.create_group("t1_fields")
        vectors.attrs["field_names"] = ["velocity"]
        mark_field(vectors.create_dataset("velocity", (*shape, 3), np.float32), time_varying=True)
        file.create_group("t2_fields").attrs["field_names"] = text_array([])
        yield file, provenance
        write_provenance(file, provenance)
        file["provenance"].attrs["complete"] = True


def _write_root(file: h5py.File, header: Header) -> None:
    file.attrs.update(
        dataset_name=header.dataset_name,
        grid_type="cartesian",
        n_spatial_dims=3,
        n_trajectories=1,
        simulation_parameters=text_array(list(header.scalars)),
        domain=header.domain,
    )
    group = file.create_group("scalars")
    group.attrs["field_names"] = text_array(list(header.scalars))
    for name, value in header.scalars.items():
        file.attrs[name] = np.float32(value)
        mark_varying(group.create_dataset(name, data=np.float32(value)))


def _write_dimensions(file: h5py.File, header: Header) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(AXES)
    # Times start at 0, because float32 cannot resolve small steps far from it.
    time = np.arange(header.snapshots) * header.time_step
    mark_varying(group.create_dataset("time", data=time.astype(np.float32)), time_varying=True)
    for axis, size in zip(AXES, header.solid_XYZ.shape, strict=True):
        places = (np.arange(size) + 0.5) * header.spacing
        mark_varying(group.create_dataset(axis, data=places.astype(np.float32)))


def _write_boundaries(file: h5py.File, header: Header) -> None:
    group = file.create_group("boundary_conditions")
    for axis, size, ends in zip(AXES, header.solid_XYZ.shape, header.ends, strict=True):
        if ends[0] == "periodic":
            add_boundary(group, f"{axis}_periodic", axis, size, "PERIODIC", [0, -1])
            continue
        for side, cell, end in (("low", 0, ends[0]), ("high", -1, ends[1])):
            kind = "OPEN" if end == "open" else "WALL"
            made = add_boundary(group, f"{axis}_{kind.lower()}_{side}", axis, size, kind, [cell])
            if kind == "WALL":
                # The schema knows only walls; the slip attribute is ours.
                made.attrs["slip"] = "free slip" if end == "free slip" else "no slip"
