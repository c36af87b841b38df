"""Write predicted snapshots as VTKHDF, which ParaView opens without a plug-in and VTK reads with `vtkHDFReader`.

In VTK's arrays x varies fastest, in this project's z: arrays are stored as [Z, Y, X], vector components in the order
x, y, z. Values are point data at the cell centres, so contours, streamlines and volumes need no conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.files import atomic_file
from shodh_moe.data.hdf5 import new_hdf5

# Version 2.0 introduced time-dependent image data; later versions add nothing needed here.
VERSION = (2, 0)
SPREAD = "_spread"


@contextmanager
def new_vtkhdf(
    path: Path,
    time_N: NDArray[np.float32],
    solid_XYZ: NDArray[np.float32],
    origin: list[float],
    spacing: list[float],
    spread: bool = False,
) -> Iterator[h5py.File]:
    """Create a file for N snapshots, to be filled with `put`. The file appears only if the block succeeds.

    Args:
        time_N: times that ParaView shows.
        solid_XYZ: 1 in solid voxels, stored once for all times.
        origin: x, y, z of the first cell's centre.
        spacing: distance of neighbouring cell centres along x, y, z.
        spread: also make the arrays ``velocity_spread`` and ``pressure_spread``, for an ensemble.

    Raises:
        UserError: the file cannot be written (disk full, no permission).
    """
    shape_ZYX, steps = solid_XYZ.shape[::-1], len(time_N)
    with atomic_file(path) as temporary, new_hdf5(temporary) as file:
        root = file.create_group("VTKHDF")
        root.attrs["Version"] = np.array(VERSION, dtype=np.int64)
        # VTK needs a string of fixed length here; h5py writes variable length by default.
        root.attrs.create("Type", b"ImageData", dtype=h5py.string_dtype("ascii", len("ImageData")))
        root.attrs["WholeExtent"] = np.array([[0, size - 1] for size in solid_XYZ.shape], dtype=np.int64).ravel()
        root.attrs["Origin"] = np.array(origin, dtype=np.float64)
        root.attrs["Spacing"] = np.array(spacing, dtype=np.float64)
        root.attrs["Direction"] = np.eye(3).ravel()
        points = root.create_group("PointData")
        endings = ["", SPREAD] if spread else [""]
        for ending in endings:
            points.create_dataset(f"velocity{ending}", (steps, *shape_ZYX, 3), np.float32)
            points.create_dataset(f"pressure{ending}", (steps, *shape_ZYX), np.float32)
        points.create_dataset("solid", data=np.ascontiguousarray(solid_XYZ.T[None], dtype=np.float32))
        series = root.create_group("Steps")
        series.attrs["NSteps"] = np.int64(steps)
        series.create_dataset("Values", data=np.asarray(time_N, dtype=np.float64))
        offsets = series.create_group("PointDataOffsets")
        for name in [f"{field}{ending}" for field in ("velocity", "pressure") for ending in endings]:
            offsets.create_dataset(name, data=np.arange(steps, dtype=np.int64))
        offsets.create_dataset("solid", data=np.zeros(steps, dtype=np.int64))
        yield file


def put(file: h5py.File, step: int, fields_4XYZ: NDArray[np.floating], ending: str = "") -> None:
    """Store velocity and pressure of snapshot number ``step``, or with the ending `SPREAD` their spread, as float32."""
    points = file["VTKHDF/PointData"]
    points[f"velocity{ending}"][step] = np.ascontiguousarray(fields_4XYZ[:3].transpose(3, 2, 1, 0), dtype=np.float32)
    points[f"pressure{ending}"][step] = np.ascontiguousarray(fields_4XYZ[3].T, dtype=np.float32)
