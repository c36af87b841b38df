"""An OpenFOAM case whose cells form a grid along x, y and z, by VTK's reader: cell/U [t, z, y, x, c], cell/p, time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkIOGeometry import vtkOpenFOAMReader

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.array_files import Array, ArrayFile, Part
from shodh_moe.data.importing.readers.vtk_data import arrays_of, updated


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the fields of a case; one time at a time is in memory. Numbered folders are the times."""
    if not (path / "constant" / "polyMesh").is_dir():
        parallel = (path / "processor0").is_dir() or (path / "processors").is_dir()
        remedy = "run `reconstructPar` in it" if parallel else "run `blockMesh` or another mesher in it"
        raise UserError(f"{path} is an OpenFOAM case without constant/polyMesh: {remedy}")
    reader = vtkOpenFOAMReader()
    reader.SetFileName(str(path / "system" / "controlDict"))
    reader.CreateCellToPointOff()
    reader.SkipZeroTimeOff()
    updated(path, reader, reader.UpdateInformation)
    reader.EnableAllCellArrays()
    times = vtk_to_numpy(reader.GetTimeValues()).copy()
    names = [reader.GetCellArrayName(index) for index in range(reader.GetNumberOfCellArrays())]
    loaded: dict[int, dict[str, Array]] = {}

    def at(number: int) -> dict[str, Array]:
        if number not in loaded:
            loaded.clear()
            data = updated(path, reader, lambda: reader.UpdateTimeStep(times[number]))
            loaded[number] = arrays_of(path, data.GetBlock(0))
        return loaded[number]

    def field(name: str) -> Array:
        first = _one(at(0), name, path, times[0])

        def raw(part: Part) -> Any:
            number, rest = part[0], part[1:]
            if not isinstance(number, int):
                raise ValueError("only one time at a time can be read: put t first in `axes`")
            array = _one(at(number), name, path, times[number])
            if array.shape != first.shape:
                raise ValueError("its mesh changes with time")
            return array.raw(rest)

        return Array(path, name, (len(times), *first.shape), raw)

    def time() -> Array:
        return Array(path, "time", times.shape, lambda part: times[part])

    arrays = {f"cell/{name}": partial(field, f"cell/{name}") for name in names}
    places = {f"cell/{axis}": partial(lambda name: at(0)[name], f"cell/{axis}") for axis in "xyz"}
    return ArrayFile(path, {**arrays, **places, "time": time}, in_memory=True)


def _one(found: dict[str, Array], name: str, path: Path, time: float) -> Array:
    if name not in found:
        raise UserError(f"{path}: {name} is not stored at time {time:g}: choose other times with `snapshots`")
    return found[name]
