"""Validate and describe the flow trajectories of a file in the_well's schema, without reading whole fields."""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.boundaries import KINDS, UNKNOWN
from shodh_moe.base.errors import UserError
from shodh_moe.base.text import NAME_RULE, is_name
from shodh_moe.inspection.structure import check_written, why_unreadable

UNIFORM = 1e-3  # largest relative deviation of a step in space or time from the mean step
AGAIN = "convert the file again"


def describe(file: h5py.File, default_domain: str) -> dict[str, Any]:
    """Describe the file's trajectories as JSON values, which are common to all of them except for ``intervals``.

    Returns:
        A dictionary of samples (number of trajectories), n_snapshots, grid [X, Y, Z], domain, periodic (three
        booleans), boundaries (kind of the low and the high face of each axis), forced, spacing (x, y, z, or None if
        unknown), intervals (time between snapshots of each trajectory, or None), units (text).

    Raises:
        UserError: see `shodh_moe.data.reading.open_trajectories`.
    """
    dims = file.attrs.get("n_spatial_dims", 3)
    if np.ndim(dims) or not isinstance(dims, (int, np.integer)) or dims != 3:
        raise UserError(f"has {_short(dims)} spatial dimensions (n_spatial_dims): only 3D trajectories can be read")
    velocity = _field(file, "t1_fields/velocity", 6, "f")
    pressure = _field(file, "t0_fields/pressure", 5, "f")
    if velocity.shape[-1] != 3 or velocity.shape[:-1] != pressure.shape:
        raise UserError(
            f"velocity {velocity.shape} and pressure {pressure.shape} do not fit together; expected "
            f"[trajectories, snapshots, X, Y, Z, 3] and [trajectories, snapshots, X, Y, Z]: {AGAIN}"
        )
    samples, n_snapshots, *grid = pressure.shape
    if min(pressure.shape) == 0:
        raise UserError(f"holds no data (pressure has shape {pressure.shape}): generate it again")
    fields = [("t1_fields/velocity", velocity), ("t0_fields/pressure", pressure)]
    if "t0_fields/solid" in file:
        solid = file["t0_fields/solid"]
        wanted = (samples, *grid) if getattr(solid, "ndim", 0) == 4 else tuple(grid)
        if getattr(solid, "shape", None) != wanted:
            raise UserError(f"solid has shape {getattr(solid, 'shape', None)}, expected {wanted}: {AGAIN}")
        fields.append(("t0_fields/solid", _field(file, "t0_fields/solid", solid.ndim, "fbui")))
    for name, dataset in fields:
        _try_reading(name, dataset)
    axes = _axes(file)
    return {
        "samples": samples,
        "n_snapshots": n_snapshots,
        "grid": grid,
        "domain": _domain(file, default_domain),
        "periodic": _periodic(file, axes),
        "boundaries": _boundaries(file, axes),
        "forced": bool(np.any(file.attrs.get("forced", True))),
        "spacing": _spacing(file, axes, grid),
        "intervals": _intervals(file, samples, n_snapshots),
        "units": _text(file["provenance"].attrs.get("units", "")) if "provenance" in file else "",
    }


def _domain(file: h5py.File, default: str) -> str:
    """Return the domain's name, which becomes a part of file names; ``default`` is the name of the file's folder."""
    for key in ("domain", "dataset_name"):
        if key in file.attrs:
            domain = _text(file.attrs[key])
            if not is_name(domain):
                raise UserError(f"attribute {key} is {_short(repr(domain))}, expected {NAME_RULE}; set another one")
            return domain
    return default if is_name(default) else "unnamed"


def _field(file: h5py.File, name: str, ndim: int, kinds: str) -> h5py.Dataset:
    """Return a field after checking its number of axes and its dtype; ``kinds`` holds the allowed `dtype.kind`."""
    if name not in file or not isinstance(file[name], h5py.Dataset):
        raise UserError(f"has no {name}{_instead(file, name)}")
    dataset = file[name]
    if dataset.ndim != ndim:
        raise UserError(f"{name} has {dataset.ndim} axes (shape {dataset.shape}), expected {ndim}: {AGAIN}")
    dtype = dataset.dtype
    if dtype.kind not in kinds or dtype.itemsize > 8:
        wanted = "float32 or float64" if kinds == "f" else "numbers"
        raise UserError(f"{name} holds {_short(dtype)}, expected {wanted}: {AGAIN}")
    return dataset


def _instead(file: h5py.File, name: str) -> str:
    """Say what the file holds instead of a missing field, and what to do."""
    group = name.split("/")[0]
    if not all(isinstance(file.get(one), h5py.Group) for one in ("t0_fields", "t1_fields")):
        return ": it is not a flow trajectory in the_well's format; import it with shodh data import"
    there = _short(", ".join(sorted(file[group])) or "nothing")
    remedy = "`pressure: zero`, or another field as the pressure" if name.endswith("pressure") else "another field"
    return f", its {group} hold {there}: import it with shodh data import and {remedy} (configs/import/the_well.yaml)"


def _try_reading(name: str, dataset: h5py.Dataset) -> None:
    """Check that all chunks were written, and read the first and the last value."""
    check_written(name, dataset)
    for which, index in (("first", 0), ("last", -1)):
        try:
            dataset[(index,) * dataset.ndim]
        except OSError as error:
            why = why_unreadable(dataset, error)
            raise UserError(f"the {which} value of {name} cannot be read, {why}: copy or generate it again") from error


def _axes(file: h5py.File) -> list[str]:
    """Return the names of the three spatial axes; [] if the file does not name three."""
    names = file["dimensions"].attrs.get("spatial_dims", []) if "dimensions" in file else []
    names = [_text(name) for name in np.atleast_1d(names)]
    return names if len(names) == 3 else []


def _periodic(file: h5py.File, axes: list[str]) -> list[bool]:
    """Return whether each axis has a PERIODIC boundary condition; False if the file does not say."""
    groups = file["boundary_conditions"].values() if isinstance(file.get("boundary_conditions"), h5py.Group) else ()
    wraps = {
        _text(axis)
        for group in groups
        if _text(group.attrs.get("bc_type", "")).upper() == "PERIODIC"
        for axis in np.atleast_1d(group.attrs.get("associated_dims", []))
    }
    return [axis in wraps for axis in axes] if axes else [False] * 3


def _boundaries(file: h5py.File, axes: list[str]) -> list[list[str]]:
    """Return the kinds of the low and the high face of each axis: wall, open or periodic; unknown if not said.

    The mask of a boundary condition says whether it holds at the first and at the last cell of its axis; a mask that
    varies has to hold always. Conditions on more than one axis are none of a face.
    """
    kinds = [[UNKNOWN, UNKNOWN] for _ in range(3)]
    groups = file["boundary_conditions"].values() if isinstance(file.get("boundary_conditions"), h5py.Group) else ()
    for group in groups:
        kind = _text(group.attrs.get("bc_type", "")).lower()
        names = [_text(axis) for axis in np.atleast_1d(group.attrs.get("associated_dims", []))]
        if kind not in KINDS or len(names) != 1 or names[0] not in axes:
            continue
        mask, faces = group.get("mask"), kinds[axes.index(names[0])]
        if kind == "periodic":
            faces[:] = [kind, kind]
        elif isinstance(mask, h5py.Dataset) and mask.ndim and mask.size and mask.dtype.kind in "biu":
            check_written(mask.name, mask)
            for side, place in enumerate((0, mask.shape[-1] - 1)):
                if np.all(mask[..., place]):
                    faces[side] = kind
    return kinds


def _spacing(file: h5py.File, axes: list[str], grid: list[int]) -> list[float] | None:
    """Return the distance between cells along each axis; None if coordinates are missing."""
    coordinates = {axis: _numbers(file, f"dimensions/{axis}") for axis in axes if f"dimensions/{axis}" in file}
    for axis, values in coordinates.items():
        if values.ndim != 1:
            raise UserError(f"dimensions/{axis} has shape {values.shape}, expected one value per cell: {AGAIN}")
    stated = [len(coordinates.get(axis, range(cells))) for axis, cells in zip(axes, grid, strict=False)]
    if axes and stated != grid:
        raise UserError(
            f"velocity and pressure have grid {grid}, but dimensions/{', '.join(axes)} have {stated}: expected one "
            "grid per file; resample it or convert it again"
        )
    steps = [step for axis, values in coordinates.items() for step in _step(f"dimensions/{axis}", values, "spacing")]
    return steps if len(steps) == 3 else None


def _intervals(file: h5py.File, samples: int, n_snapshots: int) -> list[float] | None:
    """Return the time between snapshots of each trajectory; None if the file has no times or one snapshot."""
    name = "dimensions/time"
    if name not in file:
        return None
    time = _numbers(file, name)
    if time.shape not in ((n_snapshots,), (samples, n_snapshots)):
        wanted = f"({n_snapshots},) or ({samples}, {n_snapshots})"
        raise UserError(f"{name} has shape {time.shape}, expected {wanted}: {AGAIN}")
    steps = [step for times_T in np.atleast_2d(time) for step in _step(name, times_T, "time step")]
    return (steps if time.ndim == 2 else steps * samples) or None


def _step(name: str, values: NDArray[np.float64], what: str) -> list[float]:
    """Return [step] for evenly spaced values, or [] for a single value; ``what`` names the step in messages."""
    if not np.isfinite(values).all():
        raise UserError(f"{name} has values that are not finite: {AGAIN}")
    if len(values) < 2:
        return []
    steps = np.diff(values)
    step = float(values[-1] - values[0]) / (len(values) - 1)
    at = int(np.argmin(steps))
    if steps[at] <= 0 or not math.isfinite(step):
        raise UserError(f"{name} has {what} {steps[at]:g} after value {at}, expected a positive one: {AGAIN}")
    # Values are usually float32; their rounding error grows with their magnitude.
    at = int(np.argmax(abs(steps - step)))
    if abs(steps[at] - step) > UNIFORM * step + 4 * np.finfo(np.float32).eps * abs(values).max():
        raise UserError(
            f"{name} has {what} {steps[at]:g} after value {at}, {step:g} on average: expected a constant {what}; "
            "resample it with shodh data import"
        )
    return [step]


def _numbers(file: h5py.File, name: str) -> NDArray[np.float64]:
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise UserError(f"{name} does not hold numbers: {AGAIN}")
    check_written(name, dataset)
    return np.asarray(dataset[()], dtype=np.float64)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80]
