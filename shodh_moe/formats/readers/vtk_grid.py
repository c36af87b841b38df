"""VTK's files, XML and legacy: images and grids, also unstructured ones if their points or cells form a grid."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vtkmodules import vtkIOXML
from vtkmodules.vtkIOLegacy import vtkDataSetReader

from shodh_moe.formats.arrays import ArrayFile
from shodh_moe.formats.readers.vtk_data import Values, field_values, lazily, updated, values_of

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
    names, fields = _header(path)
    stored = fields.get("field/TimeValue")
    time = {} if stored is None else {"time": stored}
    return ArrayFile(path, lazily(path, lambda: _load(path), names), time, in_memory=True)


def _header(path: Path) -> tuple[list[str], Values]:
    """The names of all arrays, and the values of those that belong to the whole data set."""
    if path.suffix.lower() == ".vtk":  # has no header
        found = _load(path)
        return list(found), {name: values for name, values in found.items() if name.startswith("field/")}
    reader = _READERS[path.suffix.lower()]()
    reader.SetFileName(str(path))
    updated(path, reader, reader.UpdateInformation)
    names = []
    for kind, selection in (
        ("point", reader.GetPointDataArraySelection()),
        ("cell", reader.GetCellDataArraySelection()),
    ):
        count = selection.GetNumberOfArrays()
        names += [f"{kind}/{selection.GetArrayName(index)}" for index in range(count)]
        names += [f"{kind}/{axis}" for axis in "xyz"] if count else []
        selection.DisableAllArrays()
    return names, field_values(updated(path, reader))


def _load(path: Path) -> Values:
    """The values of all arrays."""
    if path.suffix.lower() == ".vtk":
        reader = vtkDataSetReader()
        for kind in _OF_LEGACY:
            getattr(reader, f"ReadAll{kind}On")()
    else:
        reader = _READERS[path.suffix.lower()]()
    reader.SetFileName(str(path))
    return values_of(path, updated(path, reader))
