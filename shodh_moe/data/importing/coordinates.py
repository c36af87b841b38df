"""Read the coordinates of the grid points, and compare the mapping's spacing with those that a file states."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.axes import stored_axes
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import AXES, Mapping
from shodh_moe.data.importing.snapshots import Plan
from shodh_moe.data.importing.units import conversion, unit_of
from shodh_moe.formats import Array

UNEVEN = 1e-3  # largest relative difference of two distances considered equal, as in `shodh predict`


def even_step(points: NDArray[np.float64]) -> float:
    """Distance between neighbouring points; 0 if the points are not evenly spaced (to float32 precision)."""
    steps = np.diff(points)
    if len(steps) == 0 or not np.isfinite(steps).all():
        return 0.0
    step = float(steps.mean())
    rounding = 2 * float(np.finfo(np.float32).eps) * float(np.abs(points).max())
    return step if step and np.abs(steps - step).max() <= UNEVEN * abs(step) + rounding else 0.0


def coordinate_arrays(files: ArrayFiles, mapping: Mapping) -> list[Array]:
    """List the datasets that the mapping names as coordinates along x, y and z; none if it gives a spacing.

    Raises:
        UserError: a dataset is missing.
    """
    if mapping.coordinates is None:
        return []
    return [files.array(*files.find(getattr(mapping.coordinates, axis))[0]) for axis in AXES]


def points_of(files: ArrayFiles, mapping: Mapping, plan: Plan) -> list[NDArray[np.float64]]:
    """Read the coordinates of the cropped grid points along x, y and z, in the input's unit of length.

    They increase or decrease, as they are stored.

    Raises:
        UserError: a coordinate dataset is missing, has a wrong length, or neither increases nor decreases; or the
            mapping's spacing is not that of the coordinates along the field's dimensions that a NetCDF file holds.
    """
    if mapping.coordinates is None:
        given = mapping.spacing
        steps = list(given) if isinstance(given, list) else [float(given or 0)] * 3
        _require_stated_spacing(files, mapping, plan, steps)
        return [step * np.arange(cut.start, cut.stop) for step, cut in zip(steps, plan.crop, strict=True)]
    points = []
    for axis, array, size, cut in zip(AXES, coordinate_arrays(files, mapping), plan.shape, plan.crop, strict=True):
        where = f"{array.path}: {array.name}"
        if array.shape != (size,):
            raise UserError(f"{where} has shape {array.shape}, expected [{size}] as the fields along {axis}")
        values = array.read((slice(None),))[cut]
        between = np.diff(values)
        if not np.isfinite(values).all() or not ((between > 0).all() or (between < 0).all()):
            raise UserError(
                f"{where} neither increases nor decreases from point to point, expected the coordinates along {axis}"
            )
        points.append(values)
    return points


def _require_stated_spacing(files: ArrayFiles, mapping: Mapping, plan: Plan, steps: list[float]) -> None:
    """Compare the mapping's spacing with coordinates that have a dimension's name and a known unit."""
    place = plan.velocity[0][0]
    array = files.array(place.path, place.name)
    names = dict(
        zip(
            stored_axes(mapping.axes, array, len(mapping.components) if "c" in mapping.axes else 0),
            array.dimensions,
            strict=False,
        )
    )
    for axis, step, size in zip(AXES, steps, plan.shape, strict=True):
        if names.get(axis) not in files.at(place.path).names:
            continue
        stated = files.array(place.path, names[axis])
        factor = conversion("length", unit_of(stated), mapping.units.length, f"{stated.path}: {stated.name}")
        if factor is None or stated.shape != (size,):
            continue
        found = even_step(stated.read((slice(None),))) * factor
        wanted = step * mapping.scale.length
        if abs(found - wanted) > UNEVEN * wanted:
            what = f"goes in steps of {found:g} {mapping.units.length}" if found else "goes in uneven steps"
            raise UserError(
                f"{stated.path}: {stated.name} {what}, but the mapping's spacing along {axis} is {wanted:g}: write "
                "`coordinates` in place of spacing, or correct it"
            )
