"""VTK's files, XML and legacy: images and grids, also unstructured ones if their points or cells form a grid."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vtkmodules import vtkIOXML
from vtkmodules.vtkIOLegacy import vtkDataSetReader

from shodh_moe.data.importing.array_files import Array, ArrayFile
from shodh_moe.data.importing.readers.vtk_data import arrays_of, field_arrays, lazily, updated

_READERS: dict[str, Any] = {
    ".vti": vtkIOXML.vtkXMLImageDataReader,
    ".vtr": vtkIOXML.vtkXMLRectilinearGridReader,
    ".vts": vtkIOXML.vtkXMLStructuredGridReader,
    ".vtu": vtkIOXML.vtkXMLUnstructuredGridReader,
    ".pvti": vtkIOXML.vtkXMLPImageDataReader,
    ".pvtr": vtkIOXML.vtkXMLPRectilinearGridReader,
    ".pvts": vtkIOXML.vtkXMLPStructuredGridReader,
    ".pvtu": vtkIOXML.vtkXMLPUnstructuredGridReader,
}
_OF_LEGACY = ("Scalars", "Vectors", "Normals", "Tensors", "Fields", "TCoords", "ColorScalars")


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the arrays of the file's header; the whole file is read when the first array is opened.

    ``TimeValue``, which ParaView and many programs write, is the file's time.
    """
    if path.suffix.lower() == ".vtk":
        reader = vtkDataSetReader()
        for kind in _OF_LEGACY:
            getattr(reader, f"ReadAll{kind}On")()
        reader.SetFileName(str(path))
        found = arrays_of(path, updated(path, reader))
        return ArrayFile(path, lazily(lambda: found, list(found)), _time(found), in_memory=True)
    reader = _READERS[path.suffix.lower()]()
    reader.SetFileName(str(path))
    updated(path, reader, reader.UpdateInformation)
    names = []
    for kind in ("point", "cell"):
        part = kind.capitalize()
        count = getattr(reader, f"GetNumberOf{part}Arrays")()
        names += [f"{kind}/{getattr(reader, f'Get{part}ArrayName')(index)}" for index in range(count)]
        names += [f"{kind}/{axis}" for axis in "xyz"] if count else []
    selections = reader.GetPointDataArraySelection(), reader.GetCellDataArraySelection()
    for selection in selections:
        selection.DisableAllArrays()
    time = _time(field_arrays(path, updated(path, reader)))
    for selection in selections:
        selection.EnableAllArrays()
    return ArrayFile(path, lazily(lambda: arrays_of(path, updated(path, reader)), names), time, in_memory=True)


def _time(arrays: dict[str, Array]) -> dict[str, Any]:
    stored = arrays.get("field/TimeValue")
    return {} if stored is None else {"time": stored.read((slice(None),))}
