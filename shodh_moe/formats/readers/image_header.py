"""Volumes with a header: MetaImage (.mhd, .mha) and NRRD (.nhdr, .nrrd), by VTK. The array is called values."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from vtkmodules.vtkIOImage import vtkMetaImageReader, vtkNrrdReader

from shodh_moe.base.errors import UserError
from shodh_moe.formats.arrays import ArrayFile
from shodh_moe.formats.readers.vtk_data import Values, lazily, updated, values_of

_DATA_FILE = re.compile(r"(?im)^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.*?)\s*$")


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """Read the whole volume: values [z, y, x], and the coordinates x, y and z."""
    _require_own_data(path)
    found = _load(path)
    return ArrayFile(path, lazily(path, lambda: found, list(found)), in_memory=True)


def _load(path: Path) -> Values:
    reader = vtkMetaImageReader() if path.suffix.lower() in (".mhd", ".mha") else vtkNrrdReader()
    reader.SetFileName(str(path))
    found = values_of(path, updated(path, reader))
    return {name if (name := full.rpartition("/")[2]) in "xyz" else "values": found[full] for full in found}


def _require_own_data(path: Path) -> None:
    """Refuse a header whose values are elsewhere than beside it, as such a header can lead to any file."""
    header = path.read_bytes()[:20_000].split(b"\n\n")[0].decode(errors="replace")
    for name in _DATA_FILE.findall(header):
        if name.upper() not in ("LOCAL", "LIST") and Path(name).name != name:
            raise UserError(f"{path} keeps its values in {name}: put that file beside it and name it without a folder")
        if name.upper().startswith("LIST"):
            raise UserError(f"{path} lists one file for each slice: convert it to one file, for example with ITK-SNAP")
