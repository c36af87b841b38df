"""An OpenFOAM case whose cells form a grid along x, y and z, by VTK's reader: cell/U [t, z, y, x, c], cell/p, time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkIOGeometry import vtkOpenFOAMReader

from shodh_moe.base.errors import UserError
from shodh_moe.formats.arrays import Array, ArrayFile, Part
from shodh_moe.formats.readers.vtk_data import Values, array_of, updated, values_of


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the fields of a case; one time at a time is in memory. Numbered folders are the times."""
    if not (path / "constant" / "polyMesh").is_dir():
        parallel = (path / "processor0").is_dir() or (path / "processors").is_dir()
        remedy = "run `reconstructPar` in it" if parallel else "run `blockMesh` or another mesher in it"
        raise UserError(f"{path} is an OpenFOAM case without constant/polyMesh: {remedy}")
    reader = _reader(path)
    names = [reader.GetCellArrayName(index) for index in range(reader.GetNumberOfCellArrays())]
    times = vtk_to_numpy(reader.GetTimeValues()).copy()
    if not len(times):
        raise UserError(f"{path} holds no times: expected folders with numbers as their names")
    loaded: dict[int, Values] = {}

    def at(number: int) -> Values:
        if number not in loaded:
            loaded.clear()
            loaded[number] = _load(path, reader, times[number])
        return loaded[number]

    def field(name: str) -> Array:
        shape = _one(at(0), name, path, times[0]).shape

        def raw(part: Part) -> Any:
            number, rest = part[0], part[1:]
            if not isinstance(number, int):
                raise ValueError("only one time at a time can be read: put t first in `axes`")
            values = _one(at(number), name, path, times[number])
            if values.shape != shape:
                raise ValueError("its mesh changes with time")
            return values[rest]

        return Array(path, name, (len(times), *shape), raw)

    def place(name: str) -> Array:
        return array_of(path, name, at(0)[name])

    def time() -> Array:
        return array_of(path, "time", times)

    arrays = {f"cell/{name}": partial(field, f"cell/{name}") for name in names}
    places = {name: partial(place, name) for name in ("cell/x", "cell/y", "cell/z")}
    return ArrayFile(path, {**arrays, **places, "time": time}, in_memory=True)


def _one(found: Values, name: str, path: Path, time: float) -> NDArray[Any]:
    if name not in found:
        raise UserError(f"{path}: {name} is not stored at time {time:g}: choose other times with `snapshots`")
    return found[name]


def _reader(path: Path) -> Any:
    """The reader of a case, which keeps its mesh."""
    reader = vtkOpenFOAMReader()
    reader.SetFileName(str(path / "system" / "controlDict"))
    reader.CreateCellToPointOff()
    reader.SkipZeroTimeOff()
    updated(path, reader, reader.UpdateInformation)
    reader.EnableAllCellArrays()
    return reader


def _load(path: Path, reader: Any, time: float) -> Values:
    return values_of(path, updated(path, reader, lambda: reader.UpdateTimeStep(time)).GetBlock(0))
