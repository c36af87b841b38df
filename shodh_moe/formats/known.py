"""The file formats that can be imported, which reader reads each of them, and how to convert others."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.formats.arrays import ArrayFile, first_line


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        reader: module in `shodh_moe.formats.readers`.
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
HDF5, NETCDF, NPZ = Format("hdf5"), Format("netcdf"), Format("npz")

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
def open_here(path: Path) -> Iterator[ArrayFile]:
    """Open a file, or the folder of a format that is a folder, in this process.

    Raises:
        UserError: it is missing or damaged, or its format cannot be read (the message says how to convert it).
    """
    with ExitStack() as stack:
        found = format_of(path) or _by_content(path)
        if not path.exists():
            raise UserError(f"cannot read {path} (no such file): check the path")
        reader = importlib.import_module(f"shodh_moe.formats.readers.{found.reader}")
        try:
            opened = reader.read(path, stack)
        except UserError:
            raise
        except Exception as error:  # whatever a library raises, such as MemoryError for a damaged length
            reason = printable(getattr(error, "strerror", None) or first_line(error))[:200]
            raise UserError(
                f"cannot read {path} ({reason}): check the path, or whether it is complete and of this format"
            ) from error
        yield opened


def require_package(path: Path) -> None:
    """Raise `UserError` if the package that reads a file is not installed."""
    found = format_of(path)
    if found and found.package and importlib.util.find_spec(found.package) is None:
        raise UserError(
            f"{path} needs the package {found.package}: install it with `pip install {found.package}`, or all such "
            "packages with `pip install 'shodh_moe[formats]'`"
        )


def _by_content(path: Path) -> Format:
    """The format that the first bytes tell.

    Raises:
        UserError: it is another one; the message says how to convert it.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, but neither an OpenFOAM case (with system/controlDict) nor a .zarr folder: name "
            "files or a pattern such as folder/*.h5"
        )
    try:
        if h5py.is_hdf5(path):
            return HDF5
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): check the path") from error
    if suffix in _INDEXES:
        raise UserError(f"{path} only names other files: name these in `files` instead: {_named_in(path)}")
    if suffix == ".foam":
        raise UserError(f"{path} only marks an OpenFOAM case: name the case's folder in `files` instead")
    if suffix in CONVERT:
        raise UserError(f"{path}: {suffix} files cannot be imported: {_advice(CONVERT[suffix])}")
    if start[:3] == b"CDF" and start[3:] in (b"\x01", b"\x02"):
        return NETCDF
    if start[:2] == b"PK":
        return NPZ
    raise UserError(f"{path} is not HDF5, NetCDF 3 or 4, or npz: convert it (NetCDF 5: `nccopy -k nc4 in.nc out.nc`)")


def _advice(text: str) -> str:
    return f"convert them, for example with `{text}`" if text.split()[0] in ("python", "cdo") else text


def _named_in(path: Path) -> str:
    text = path.read_bytes()[:100_000].decode(errors="replace")
    names = sorted(set(re.findall(r"""[^\s<>"'=:]+\.(?:h5|hdf5|vti|vtr|vts|vtu|vtk)\b""", text)))
    return printable(", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "none was found in it"
