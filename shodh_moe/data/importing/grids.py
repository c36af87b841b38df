"""Build the uniform grid of cubic cells from the grid points of the input, and interpolate onto it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from shodh_moe.base.errors import UserError
from shodh_moe.config import COMPRESSION
from shodh_moe.data.importing.coordinates import UNEVEN, even_step
from shodh_moe.data.importing.mapping import AXES, Boundaries, Mapping, Resample


@dataclass(frozen=True)
class Grid:
    """The uniform grid of an imported trajectory, and the interpolation onto it.

    Attributes:
        cells: number of cells (X, Y, Z).
        first: for each axis the first cell that is kept, of those before ``crop: auto``.
        spacing: size of the cubic cells, in the input's unit of length.
        origin: position of the first grid point, in the same unit.
        weights: for each axis the interpolation matrix [new, old], or None without interpolation.
        reversed: the axes of X, Y, Z (0, 1, 2) along which the input's coordinates decrease.
    """

    cells: tuple[int, int, int]
    first: tuple[int, int, int]
    spacing: float
    origin: tuple[float, float, float]
    weights: tuple[NDArray[np.float64] | None, ...]
    reversed: tuple[int, ...] = ()

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Put fields [..., X, Y, Z] on the new grid: reverse axes along which coordinates decrease, and interpolate."""
        if self.reversed:
            values = np.ascontiguousarray(np.flip(values, tuple(values.ndim - 3 + axis for axis in self.reversed)))
        for axis, (matrix, first, size) in enumerate(
            zip(self.weights, self.first, self.cells, strict=True), start=values.ndim - 3
        ):
            if matrix is not None:
                values = np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)
            elif values.shape[axis] != size:
                values = np.take(values, first + np.arange(size), axis)
        return values


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
        spacing, origin, sizes, weights = _resampled(points, mapping.resample, mapping.boundaries)
    x, y, z = kept = _divisible(sizes, mapping)
    weights = [None if one is None else one[cut] for one, cut in zip(weights, kept, strict=True)]
    origin = [low + cut.start * spacing for low, cut in zip(origin, kept, strict=True)]
    return Grid(
        (x.stop - x.start, y.stop - y.start, z.stop - z.start),
        (x.start, y.start, z.start),
        spacing,
        (origin[0], origin[1], origin[2]),
        tuple(weights),
        backwards,
    )


def _resampled(
    points: list[NDArray[np.float64]], resample: Resample, boundaries: Boundaries
) -> tuple[float, list[float], list[int], list[NDArray[np.float64] | None]]:
    """Return spacing, origin, sizes and interpolation matrices of the grid that ``resample`` specifies."""
    origin: list[float] = []
    sizes: list[int] = []
    weights: list[NDArray[np.float64] | None] = []
    for index, (axis, old) in enumerate(zip(AXES, points, strict=True)):
        if boundaries.periodic[index]:
            new, period = _periodic_points(axis, old, resample.spacing), len(old) * even_step(old)
        else:
            # Cells fill the box from its first point on; values are at cell centres.
            count = int((old[-1] - old[0]) / resample.spacing * (1 + 1e-6))
            new, period = old[0] + (np.arange(count) + 0.5) * resample.spacing, None
            new = new[new <= old[-1]]
        wanted = resample.cells[index] if resample.cells else len(new)
        wall = not period and boundaries.ends(axis)[1] in ("wall", "free slip")
        if not 0 < wanted <= len(new) or ((period or wall) and wanted != len(new)):
            raise UserError(
                f"resample.cells asks for {wanted} along {axis}, but {len(new)} of size {resample.spacing:g} fit"
                + (
                    ": a periodic axis needs all of them"
                    if period
                    else f": fewer would cut off the wall at its end; set the high end of boundaries.{axis} to open"
                    if wall
                    else ": choose another spacing"
                )
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


def _divisible(sizes: list[int], mapping: Mapping) -> list[slice]:
    """Return the cells to keep along each axis: all, or with ``crop: auto`` as many as the tokenizer supports.

    ``crop: auto`` cuts off the high end, or the low end if there is a wall at the high one.

    Raises:
        UserError: a size is not a multiple of the tokenizer's compression and cannot be cropped.
    """
    kept = []
    for axis, size, periodic in zip(AXES, sizes, mapping.boundaries.periodic, strict=True):
        rest = size % COMPRESSION
        fit = size - rest
        walls = [end in ("wall", "free slip") for end in mapping.boundaries.ends(axis)]
        cut_low = walls[1]
        kept.append(slice(rest if cut_low else 0, size if cut_low else fit))
        if not rest and size:
            continue
        if periodic:
            raise UserError(
                (f"`crop: auto` would remove {rest}" if mapping.crop == "auto" else f"the grid has {size}")
                + f" cells along {axis}, which is periodic, but the tokenizer needs a multiple of {COMPRESSION}: "
                + (f"if the last point repeats the first, write `repeated_end: [{axis}]`; " if rest == 1 else "")
                + f"choose resample.spacing so that the period fits, or set boundaries.{axis} to open and crop"
            )
        if not fit:
            raise UserError(
                f"the grid has {size} cells along {axis}, but the tokenizer needs {COMPRESSION} or more: use "
                f"`resample` with a spacing of at most {size / COMPRESSION:.2g} times this one, or finer data"
            )
        if mapping.crop == "auto" and all(walls):
            raise UserError(
                f"`crop: auto` would remove {rest} of {size} cells along {axis} and with them one of its two walls: "
                f"choose resample.spacing so that a multiple of {COMPRESSION} cells fits, or set one end of "
                f"boundaries.{axis} to open"
            )
        if mapping.crop != "auto":
            cure = "" if all(walls) else f", or `crop: auto` to keep {fit}"
            raise UserError(
                f"the grid has {size} cells along {axis}, but the tokenizer needs a multiple of {COMPRESSION}: set "
                f"crop.{axis}{cure}, or choose resample.spacing"
            )
    return kept


def _spacing(axis: str, points: NDArray[np.float64]) -> str:
    if len(points) < 2:
        return f"{axis}: one point"
    steps = np.abs(np.diff(points))
    return f"{axis}: {steps.mean():.4g}" if even_step(points) else f"{axis}: {steps.min():.4g} to {steps.max():.4g}"
