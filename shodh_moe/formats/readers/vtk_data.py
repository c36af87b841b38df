"""Read VTK's data sets with the package vtk, and name their arrays.

Arrays are named point/NAME, cell/NAME and field/NAME, in axes z, y, x and c. The coordinates of the points and of the
cells' centres are point/x and cell/x, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkOutputWindow, vtkStringOutputWindow
from vtkmodules.vtkCommonDataModel import vtkImageData, vtkRectilinearGrid, vtkStructuredGrid, vtkUnstructuredGrid
from vtkmodules.vtkFiltersCore import vtkCellCenters

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.formats.arrays import Array, require_numbers

Values = dict[str, NDArray[Any]]

Points = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]  # coordinates along x, y and z
_APART = 1e-5  # coordinates closer than this share of the box are those of the same plane
_RESAMPLE = "in ParaView apply Resample To Image and save it as .vti"


def updated(path: Path, reader: Any, update: Callable[[], object] | None = None) -> Any:
    """Run a reader and return its output; VTK prints its errors instead of raising them, so they are collected.

    Args:
        update: what to run; default: the reader's ``Update``.

    Raises:
        UserError: VTK reports an error.
    """
    before, log = vtkOutputWindow.GetInstance(), vtkStringOutputWindow()
    vtkOutputWindow.SetInstance(log)
    try:
        (update or reader.Update)()
        text = log.GetOutput()
    finally:
        vtkOutputWindow.SetInstance(before)
    data = reader.GetOutputDataObject(0)
    if "ERR" in text or data is None:
        lines = [line.split("): ", 1)[-1].strip() for line in text.splitlines() if "ERR|" in line or "): " in line]
        reason = printable(lines[0] if lines else text)[:160] or "no data"
        raise UserError(f"{path}: VTK cannot read it ({reason}): check that it is complete")
    return data


def values_of(path: Path, data: Any) -> Values:
    """All arrays of a data set, and the coordinates of its points and cells.

    Raises:
        UserError: the points or cells are not those of a grid along x, y and z.
    """
    found: Values = {}
    for kind, attributes in (("point", data.GetPointData()), ("cell", data.GetCellData())):
        if not attributes.GetNumberOfArrays():
            continue
        points, order = _places(path, data, kind)
        for axis, values in zip("xyz", points, strict=True):
            found[f"{kind}/{axis}"] = values
        shape = tuple(len(values) for values in points[::-1])
        for name, flat in _numbers(attributes):
            values = flat if order is None else flat[order]
            found[f"{kind}/{name}"] = values.reshape(*shape, *flat.shape[1:])
    return {**found, **field_values(data)}


def field_values(data: Any) -> Values:
    """Values that belong to the whole data set, such as its time."""
    return {f"field/{name}": flat for name, flat in _numbers(data.GetFieldData())}


def array_of(path: Path, name: str, values: NDArray[Any]) -> Array:
    """An array that is in memory."""
    require_numbers(path, name, values.dtype)
    return Array(path, name, tuple(values.shape), lambda part: values[part])


def _numbers(attributes: Any) -> list[tuple[str, NDArray[Any]]]:
    """Names and values [N] or [N, C] of the arrays of numbers."""
    found = []
    for index in range(attributes.GetNumberOfArrays()):
        array = attributes.GetArray(index)  # None for text
        if array is not None:
            found.append((array.GetName() or f"array_{index}", vtk_to_numpy(array)))
    return found


def _places(path: Path, data: Any, kind: str) -> tuple[Points, NDArray[np.int64] | None]:
    """Coordinates of points or cell centres along each axis, and the order that sorts values to z, y, x, if needed."""
    if isinstance(data, (vtkImageData, vtkRectilinearGrid)):
        if isinstance(data, vtkImageData):
            if not data.GetDirectionMatrix().IsIdentity():
                raise UserError(f"{path}: its axes are turned against x, y and z: {_RESAMPLE}")
            origin, spacing, extent = data.GetOrigin(), data.GetSpacing(), data.GetExtent()
            points = [
                origin[a] + spacing[a] * np.arange(extent[2 * a], extent[2 * a + 1] + 1, dtype=np.float64)
                for a in range(3)
            ]
        else:
            given = (data.GetXCoordinates(), data.GetYCoordinates(), data.GetZCoordinates())
            points = [vtk_to_numpy(one).astype(np.float64) for one in given]
        if kind == "cell":
            points = [(one[1:] + one[:-1]) / 2 if len(one) > 1 else one for one in points]
        return (points[0], points[1], points[2]), None
    if not isinstance(data, (vtkStructuredGrid, vtkUnstructuredGrid)):
        raise UserError(f"{path} holds {data.GetClassName()}, expected a grid: {_RESAMPLE}")
    return _sorted_to_a_grid(path, _positions(data, kind), f"{kind}s")


def _positions(data: Any, kind: str) -> NDArray[np.float64]:
    """Positions [N, 3] of the points or of the cells' centres."""
    if kind == "cell":
        centers = vtkCellCenters()
        centers.SetInputData(data)
        centers.Update()
        data = centers.GetOutput()
    return vtk_to_numpy(data.GetPoints().GetData()).astype(np.float64)


def _sorted_to_a_grid(path: Path, positions: NDArray[np.float64], what: str) -> tuple[Points, NDArray[np.int64]]:
    """Coordinates of the planes along each axis, and the order that sorts the positions to z, y, x.

    Raises:
        UserError: the positions are not all crossings of planes along x, y and z.
    """
    planes, indices = [], []
    for along in positions.T:
        order = np.argsort(along, kind="stable")
        steps = np.diff(along[order])
        group = np.concatenate([[0], np.cumsum(steps > _APART * max(np.ptp(along), np.finfo(np.float32).tiny))])
        index = np.empty(len(along), np.int64)
        index[order] = group
        indices.append(index)
        planes.append(np.bincount(index, along) / np.bincount(index))
    sizes = [len(one) for one in planes]
    flat = (indices[2] * sizes[1] + indices[1]) * sizes[0] + indices[0]
    if int(np.prod(sizes)) != len(positions) or len(np.unique(flat)) != len(positions):
        raise UserError(
            f"{path}: its {len(positions)} {what} are not those of a grid along x, y and z "
            f"({' x '.join(map(str, sizes))} planes): {_RESAMPLE}"
        )
    return (planes[0], planes[1], planes[2]), np.argsort(flat)


def lazily(path: Path, load: Callable[[], Values], names: list[str]) -> dict[str, Callable[[], Array]]:
    """Functions that open each array; the first of them loads all."""
    loaded: Values = {}

    def opener(name: str) -> Callable[[], Array]:
        def array() -> Array:
            if not loaded:
                loaded.update(load())
            return array_of(path, name, loaded[name])

        return array

    return {name: opener(name) for name in names}
