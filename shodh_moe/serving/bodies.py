"""Read the flow in a request's body, and write the forecast of an answer: npz or HDF5 in the_well's schema.

Nothing in a body is trusted. HDF5 is inspected in a separate process before it is opened, and refused if it refers to
other files (`shodh_moe.inspection`). Of an npz file, the headers of the arrays are checked before the arrays are read,
and pickled objects are refused.

Shapes: T given snapshots, N predicted ones, X Y Z space.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.data.dataset import Dataset, Fields
from shodh_moe.data.prediction_file import FACES, new_prediction
from shodh_moe.data.reading import TrajectoryRecord, open_trajectories
from shodh_moe.inference.model import Model
from shodh_moe.serving.limits import Limits, Refused

ARRAYS = {"velocity": 5, "pressure": 5, "solid": 4, "time": 1}  # numbers of axes
MEDIA = {"npz": "application/x-npz", "hdf5": "application/x-hdf5"}


class Given(NamedTuple):
    """The flow of a request.

    Attributes:
        fields: as many snapshots as the model needs, or more.
        record: where it is in an HDF5 body; None for npz.
    """

    fields: Fields
    record: TrajectoryRecord | None


def read_body(path: Path, limits: Limits) -> Given:
    """Read a body that was stored in a file.

    Raises:
        Refused: it is neither npz nor HDF5, is damaged, too large, or holds something else.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        return Given(_read_npz(path, limits), None)
    if start != b"\x89HDF\r\n\x1a\n":
        raise Refused(415, "the body is neither npz nor HDF5: send a file of numpy.savez, or HDF5 in the_well's schema")
    try:
        records = open_trajectories(path)
        if len(records) > 1:
            raise Refused(422, f"the body has {len(records)} trajectories: send one")
        if records[0].nbytes > limits.body_bytes:
            raise Refused(413, f"the body has {records[0].nbytes} bytes unpacked, more than {limits.body_bytes}")
        return Given(Dataset(records)[0], records[0])
    except UserError as error:
        raise Refused(422, str(error).replace(str(path), "the body")) from None


def _read_npz(path: Path, limits: Limits) -> Fields:
    tensors: dict[str, Tensor] = {}
    left = limits.body_bytes
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if unknown := sorted(names - ARRAYS.keys()):
                shown = printable(unknown[0])[:80]
                raise Refused(
                    422, f"the body has an array {shown}: send velocity, pressure and solid, and perhaps time"
                )
            for name in sorted(names):
                values = _read_array(archive, name, left)
                left -= values.nbytes
                tensors[name] = torch.from_numpy(values)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, OSError, NotImplementedError) as error:
        reason = printable(str(error))[:150] or type(error).__name__
        raise Refused(422, f"the body is no sound npz file ({reason}): write it with numpy.savez") from None
    if missing := [name for name in ("velocity", "pressure") if name not in tensors]:
        raise Refused(422, f"the body has no {missing[0]}: send the arrays velocity and pressure, and solid for walls")
    return Fields(tensors)


def _read_array(archive: zipfile.ZipFile, name: str, left: int) -> NDArray[Any]:
    """Read one array as float32, or float64 for times, after a look at its header."""
    with archive.open(f"{name}.npy") as member:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        kind = np.lib.format.read_magic(member)
        if kind not in read:
            raise Refused(422, f"the array {name} has version {kind} of the npy format: write it with numpy.savez")
        shape, _, dtype = read[kind](member)
    if dtype.kind not in "fbiu" or dtype.itemsize > 8:
        raise Refused(
            422, f"the array {name} holds {printable(str(dtype))[:40]}, not real numbers: convert it to float32"
        )
    if len(shape) != ARRAYS[name]:
        raise Refused(422, f"the array {name} has shape {list(shape)[:8]}, not {ARRAYS[name]} axes: see /info")
    if (size := int(np.prod(shape, dtype=object)) * max(dtype.itemsize, 4)) > left:
        raise Refused(413, f"the array {name} has {size} bytes unpacked: the service takes {left} more")
    with archive.open(f"{name}.npy") as member, np.errstate(over="ignore"):
        values = np.lib.format.read_array(member, allow_pickle=False)
        return values.astype(np.float64 if name == "time" else np.float32)


def write_npz(forecast: Fields, dtype: str) -> bytes:
    """Return a forecast as an npz file: the arrays of `Fields`, velocities and pressure in ``dtype``."""
    arrays: dict[str, Any] = {
        name: values.to(getattr(torch, dtype)).numpy() if name not in ("time", "solid") else values.numpy()
        for name, values in forecast.items()
    }
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def write_hdf5(forecast: Fields, given: Given, dtype: str, model: Model, path: Path) -> bytes:
    """Return a forecast as HDF5 in the_well's schema, with axes, boundaries and scalars of the body that it continues.

    Args:
        path: a file to make and remove.
    """
    if given.record is None:
        raise Refused(422, "an HDF5 answer continues an HDF5 body: send HDF5, or ask for format=npz")
    steps = len(forecast["velocity"])
    time_N = forecast["time"].numpy() if "time" in forecast else np.arange(steps, dtype=np.float64)
    provenance = {
        "checkpoint_step": model.step,
        "checkpoint_weights_sha256": model.weights_sha256,
        "divergence_operator": model.operator,
        "package_version": version("shodh_moe"),
    }
    faces = FACES in forecast
    with new_prediction(path, [given.record], time_N.astype(np.float32), dtype, provenance, faces=faces) as file:
        file["t0_fields/pressure"][0] = forecast["pressure"][:, 0].numpy()
        for name in ("velocity", *[FACES] * faces):
            file[f"t1_fields/{name}"][0] = forecast[name].movedim(1, -1).numpy()
    data = path.read_bytes()
    path.unlink()
    return data


def slices(forecast: Fields) -> dict[str, Any]:
    """Return the middle planes of a forecast for the page: values of every step by quantity and axis, rounded."""
    speed_NXYZ = forecast["velocity"].norm(dim=1)
    solid_XYZ = forecast["solid"][0] > 0
    planes: dict[str, Any] = {"speed": {}, "pressure": {}, "solid": {}}
    for axis, name in enumerate("xyz"):
        middle = solid_XYZ.shape[axis] // 2
        planes["solid"][name] = solid_XYZ.select(axis, middle).int().tolist()
        for quantity, values_NXYZ in (("speed", speed_NXYZ), ("pressure", forecast["pressure"][:, 0])):
            plane = values_NXYZ.select(axis + 1, middle)
            digits = 5 - int(np.ceil(np.log10(max(float(plane.abs().max()), 1e-30))))
            planes[quantity][name] = np.round(plane.numpy(), digits).tolist()
    return {"steps": len(speed_NXYZ), "grid": list(solid_XYZ.shape), **planes}
