"""The file formats that can be imported, which reader reads each of them, and how to convert others."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.data.importing.array_files import ArrayFile, open_array_file


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        reader: module in `shodh_moe.data.importing.readers`.
        package: the package that it needs beyond those of every installation, in the extra ``formats``; or None.
    """

    reader: str
    package: str | None = None


# By the end of the file's name. HDF5, NetCDF and npz files are recognised by their first bytes, whatever their name.
_VTK = ("vtk", "vti", "vtr", "vts", "vtu", "pvti", "pvtr", "pvts", "pvtu")
FORMATS = {
    ".npy": Format("npy"),
    ".mat": Format("matlab"),
    ".zarr": Format("zarr_folder", "zarr"),
    **dict.fromkeys((".tif", ".tiff"), Format("tiff", "tifffile")),
    **dict.fromkeys([f".{one}" for one in _VTK], Format("vtk_grid", "vtk")),
    **dict.fromkeys((".mhd", ".mha", ".nhdr", ".nrrd"), Format("image_header", "vtk")),
}
OPENFOAM = Format("openfoam", "vtk")  # a folder with system/controlDict

_SAVE = "save its arrays with numpy.savez"
_PARAVIEW = "open it in ParaView, apply Resample To Image, and save it as .vti"
CONVERT = {
    **dict.fromkeys((".pt", ".pth"), "python -c \"import numpy, torch; numpy.save('out.npy', torch.load('in.pt'))\""),
    **dict.fromkeys((".csv", ".txt"), "python -c \"import numpy; numpy.save('out.npy', numpy.loadtxt('in.txt'))\""),
    **dict.fromkeys((".grb", ".grib", ".grib2"), "cdo -f nc4 copy in.grib out.nc"),
    **dict.fromkeys((".cgns", ".plt", ".szplt", ".case", ".exo", ".ex2", ".e", ".vth", ".vthb"), _PARAVIEW),
    ".pkl": _SAVE,
    ".raw": "python -c \"import numpy; numpy.save('out.npy', numpy.fromfile('in.raw', 'f4').reshape(64, 64, 64))\"",
}
_INDEXES = (".xdmf", ".xmf", ".xdmf3", ".pvd", ".vtm", ".vtmb")  # XML that only names other files


def format_of(path: Path) -> Format | None:
    """The format of a file or folder; None for HDF5, NetCDF and npz, and for what is not known."""
    if path.is_dir() and (path / "system" / "controlDict").exists():
        return OPENFOAM
    # MATLAB's version 7.3 is HDF5, and so are files of some programs that name them .vtk or .mat.
    return None if path.is_file() and h5py.is_hdf5(path) else FORMATS.get(path.suffix.lower())


@contextmanager
def open_file(path: Path) -> Iterator[ArrayFile]:
    """Open a file, or the folder of a format that is a folder.

    Raises:
        UserError: it is missing or damaged, its format cannot be read (the message says how to convert it), or the
            package that reads it is not installed.
    """
    with ExitStack() as stack:
        found = format_of(path)
        yield _read(path, found, stack) if found else stack.enter_context(_open_known(path))


def _open_known(path: Path) -> AbstractContextManager[ArrayFile]:
    """Open an HDF5, NetCDF or npz file, after a check for formats that have to be converted."""
    suffix = path.suffix.lower()
    if path.is_file() and not h5py.is_hdf5(path):
        if suffix in _INDEXES:
            raise UserError(f"{path} only names other files: name these in `files` instead: {_named_in(path)}")
        if suffix == ".foam":
            raise UserError(f"{path} only marks an OpenFOAM case: name the case's folder in `files` instead")
        if suffix in CONVERT:
            raise UserError(f"{path}: {suffix} files cannot be imported: {_advice(CONVERT[suffix])}")
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, but neither an OpenFOAM case (with system/controlDict) nor a .zarr folder: name "
            "files or a pattern such as folder/*.h5"
        )
    return open_array_file(path)


def _advice(text: str) -> str:
    return f"convert them, for example with `{text}`" if text.split()[0] in ("python", "cdo") else text


def _named_in(path: Path) -> str:
    text = path.read_bytes()[:100_000].decode(errors="replace")
    names = sorted(set(re.findall(r"""[^\s<>"'=:]+\.(?:h5|hdf5|vti|vtr|vts|vtu|vtk)\b""", text)))
    return printable(", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "none was found in it"


def _read(path: Path, found: Format, stack: ExitStack) -> ArrayFile:
    """Read a file with the format's reader."""
    if not path.exists():
        raise UserError(f"cannot read {path} (no such file): check the path")
    if found.package and importlib.util.find_spec(found.package) is None:
        raise UserError(
            f"{path} needs the package {found.package}: install it with `pip install {found.package}`, or all such "
            "packages with `pip install 'shodh_moe[formats]'`"
        )
    reader = importlib.import_module(f"shodh_moe.data.importing.readers.{found.reader}")
    try:
        opened = reader.read(path, stack)
        assert isinstance(opened, ArrayFile)
        return opened
    except UserError:
        raise
    except Exception as error:  # whatever a library raises on a file that it cannot read
        reason = printable(str(error))[:200] or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}): check that it is complete and of this format") from error
