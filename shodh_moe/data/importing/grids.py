"""Build the uniform grid of cubic cells from the grid points of the input, and interpolate onto it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from shodh_moe.base.errors import UserError
from shodh_moe.config import COMPRESSION
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import AXES, Mapping, Resample
from shodh_moe.data.importing.snapshots import Plan

UNEVEN = 1e-3  # largest relative difference of two distances considered equal, as in `shodh predict`


@dataclass(frozen=True)
class Grid:
    """The uniform grid of an imported trajectory, and the interpolation onto it.

    Attributes:
        cells: number of cells (X, Y, Z).
        spacing: size of the cubic cells, in the input's unit of length.
        origin: position of the first grid point, in the same unit.
        weights: for each axis the interpolation matrix [new, old], or None without interpolation.
        reversed: the axes of X, Y, Z (0, 1, 2) along which the input's coordinates decrease.
    """

    cells: tuple[int, int, int]
    spacing: float
    origin: tuple[float, float, float]
    weights: tuple[NDArray[np.float64] | None, ...]
    reversed: tuple[int, ...] = ()

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Put fields [..., X, Y, Z] on the new grid: reverse axes along which coordinates decrease, and interpolate."""
        if self.reversed:
            values = np.ascontiguousarray(np.flip(values, tuple(values.ndim - 3 + axis for axis in self.reversed)))
        for axis, (matrix, size) in enumerate(zip(self.weights, self.cells, strict=True), start=values.ndim - 3):
            if matrix is None:
                values = np.take(values, np.arange(size), axis) if values.shape[axis] != size else values
            else:
                values = np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)
        return values


def even_step(points: NDArray[np.float64]) -> float:
    """Distance between neighbouring points; 0 if the points are not evenly spaced (to float32 precision)."""
    steps = np.diff(points)
    if len(steps) == 0 or not np.isfinite(steps).all():
        return 0.0
    step = float(steps.mean())
    rounding = 2 * float(np.finfo(np.float32).eps) * float(np.abs(points).max())
    return step if step and np.abs(steps - step).max() <= UNEVEN * abs(step) + rounding else 0.0


def points_of(files: ArrayFiles, mapping: Mapping, plan: Plan) -> list[NDArray[np.float64]]:
    """Read the coordinates of the cropped grid points along x, y and z, in the input's unit of length.

    They increase or decrease, as they are stored.

    Raises:
        UserError: a coordinate dataset is missing, has a wrong length, or neither increases nor decreases.
    """
    if mapping.coordinates is None:
        given = mapping.spacing
        steps = list(given) if isinstance(given, list) else [float(given or 0)] * 3
        return [step * np.arange(cut.start, cut.stop) for step, cut in zip(steps, plan.crop, strict=True)]
    points = []
    for axis, size, cut in zip(AXES, plan.shape, plan.crop, strict=True):
        path, name = files.find(getattr(mapping.coordinates, axis))[0]
        array = files.at(path).array(name)
        if array.shape != (size,):
            raise UserError(f"{path}: {name} has shape {array.shape}, expected [{size}] as the fields along {axis}")
        values = array.read((slice(None),))[cut]
        between = np.diff(values)
        if not np.isfinite(values).all() or not ((between > 0).all() or (between < 0).all()):
            raise UserError(
                f"{path}: {name} neither increases nor decreases from point to point, expected the coordinates along "
                f"{axis}"
            )
        points.append(values)
    return points


def new_grid(points: list[NDArray[np.float64]], mapping: Mapping) -> Grid:
    """Build the uniform grid that a mapping specifies.

    Raises:
        UserError: cells are not cubic and the mapping has no ``resample``, or the new grid does not fit.
    """
    backwards = tuple(axis for axis, one in enumerate(points) if len(one) > 1 and one[0] > one[-1])
    points = [one[::-1] if axis in backwards else one for axis, one in enumerate(points)]
    for axis, one in zip(AXES, points, strict=True):
        if len(one) < 2:
            raise UserError(f"the input has {len(one)} point along {axis}: the model needs 3D flows, not 2D ones")
    if mapping.resample is None:
        steps = [even_step(one) for one in points]
        if min(steps) <= 0 or np.ptp(steps) > UNEVEN * min(steps):
            shown = "; ".join(_spacing(axis, one) for axis, one in zip(AXES, points, strict=True))
            raise UserError(
                f"the input's cells are not cubic ({shown}): choose an interpolation, "
                "e.g. `resample: {method: cubic, spacing: 0.01}`"
            )
        spacing = float(np.mean(steps))
        weights: list[NDArray[np.float64] | None] = [None, None, None]
        origin, sizes = [float(one[0]) for one in points], [len(one) for one in points]
    else:
        spacing, origin, sizes, weights = _resampled(points, mapping.resample, mapping.boundaries.periodic)
    cells = _divisible(sizes, mapping)
    weights = [None if one is None else one[:size] for one, size in zip(weights, cells, strict=True)]
    return Grid((cells[0], cells[1], cells[2]), spacing, (origin[0], origin[1], origin[2]), tuple(weights), backwards)


def _resampled(
    points: list[NDArray[np.float64]], resample: Resample, periodic: tuple[bool, bool, bool]
) -> tuple[float, list[float], list[int], list[NDArray[np.float64] | None]]:
    """Return spacing, origin, sizes and interpolation matrices of the grid that ``resample`` specifies."""
    origin: list[float] = []
    sizes: list[int] = []
    weights: list[NDArray[np.float64] | None] = []
    for index, (axis, old) in enumerate(zip(AXES, points, strict=True)):
        if periodic[index]:
            new, period = _periodic_points(axis, old, resample.spacing), len(old) * even_step(old)
        else:
            # Cells fill the box from its first point on; values are at cell centres.
            count = int((old[-1] - old[0]) / resample.spacing * (1 + 1e-6))
            new, period = old[0] + (np.arange(count) + 0.5) * resample.spacing, None
            new = new[new <= old[-1]]
        wanted = resample.cells[index] if resample.cells else len(new)
        if not 0 < wanted <= len(new) or (period and wanted != len(new)):
            raise UserError(
                f"resample.cells asks for {wanted} along {axis}, but {len(new)} of size {resample.spacing:g} fit"
                + (": a periodic axis needs all of them" if period else ": choose another spacing")
            )
        origin.append(float(new[0]))
        sizes.append(wanted)
        weights.append(interpolation(old, new[:wanted], resample.method, period))
    return resample.spacing, origin, sizes, weights


def _periodic_points(axis: str, old: NDArray[np.float64], spacing: float) -> NDArray[np.float64]:
    """Return the points of a periodic axis that divide its period into cells of size ``spacing``."""
    step = even_step(old)
    if not step:
        raise UserError(
            f"axis {axis} is periodic with uneven points: its period is unknown; set boundaries.{axis}: open"
        )
    count = len(old) * step / spacing
    if abs(count - round(count)) > UNEVEN * min(1.0, count) or round(count) < 1:
        raise UserError(
            f"the period of axis {axis}, {len(old) * step:g}, is not a multiple of resample.spacing {spacing:g}: "
            f"use {len(old) * step / max(round(count), 1):.9g}"
        )
    return np.asarray(old[0] + np.arange(round(count)) * (len(old) * step / round(count)))


def interpolation(
    old: NDArray[np.float64], new: NDArray[np.float64], method: str, period: float | None = None
) -> NDArray[np.float64]:
    """Matrix [new, old] of linear or cubic spline interpolation; exact for polynomials of that degree.

    Args:
        period: length of a periodic axis, whose first point is not repeated at its end; None if not periodic.
    """
    identity = np.eye(len(old))
    if period:
        old, identity = np.append(old, old[0] + period), np.vstack([identity, identity[:1]])
    if method == "cubic":
        return np.asarray(CubicSpline(old, identity, bc_type="periodic" if period else "not-a-knot")(new))
    return np.stack([np.interp(new, old, column) for column in identity.T], 1)


def _divisible(sizes: list[int], mapping: Mapping) -> list[int]:
    """Return the sizes if the tokenizer supports them; with ``crop: auto``, the next smaller sizes that it supports.

    Raises:
        UserError: a size is not a multiple of the tokenizer's compression and cannot be cropped.
    """
    cells = [size // COMPRESSION * COMPRESSION for size in sizes]
    for axis, size, fit, periodic in zip(AXES, sizes, cells, mapping.boundaries.periodic, strict=True):
        if size == fit and size:
            continue
        if periodic:
            raise UserError(
                (f"`crop: auto` would remove {size - fit}" if mapping.crop == "auto" else f"the grid has {size}")
                + f" cells along {axis}, which is periodic, but the tokenizer needs a multiple of {COMPRESSION}: "
                + (f"if the last point repeats the first, write `repeated_end: [{axis}]`; " if size == fit + 1 else "")
                + f"choose resample.spacing so that the period fits, or set boundaries.{axis} to open and crop"
            )
        if not fit:
            raise UserError(
                f"the grid has {size} cells along {axis}, but the tokenizer needs {COMPRESSION} or more: use "
                f"`resample` with a spacing of at most {size / COMPRESSION:.2g} times this one, or finer data"
            )
        if mapping.crop != "auto":
            raise UserError(
                f"the grid has {size} cells along {axis}, but the tokenizer needs a multiple of {COMPRESSION}: set "
                f"crop.{axis}, or `crop: auto` to keep {fit}, or choose resample.spacing"
            )
    return cells


def _spacing(axis: str, points: NDArray[np.float64]) -> str:
    if len(points) < 2:
        return f"{axis}: one point"
    steps = np.abs(np.diff(points))
    return f"{axis}: {steps.mean():.4g}" if even_step(points) else f"{axis}: {steps.min():.4g} to {steps.max():.4g}"
