"""Small files of the formats that `shodh data import` reads, with their mappings and what each format's library reads.

Every set holds one trajectory of three snapshots. `read_by_owner` reads it again with the library that owns the
format, by code that shares nothing with the importer's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import tifffile
from scipy.io import loadmat, savemat

GRID, T = (8, 8, 8), 3
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Set:
    """The files of one trajectory.

    Attributes:
        name: format and layout.
        kind: how `read_by_owner` reads it.
        files: content of each file, by its path relative to the set's folder.
        mutable: the files to mutate.
        mapping: keys of the mapping that differ from `_COMMON`.
    """

    name: str
    kind: str
    files: dict[str, bytes]
    mutable: list[str]
    mapping: dict[str, Any] = field(default_factory=dict)


_COMMON: dict[str, Any] = {
    "name": "fuzz",
    "domain": "box",
    "axes": ["t", "x", "y", "z"],
    "velocity": ["u", "v", "w"],
    "pressure": "p",
    "spacing": 0.5,
    "time": "time",
    "boundaries": {"x": "open", "y": "open", "z": "open"},
    "units": {"length": "m", "time": "s"},
}
_POINTS: dict[str, Any] = {"spacing": None, "coordinates": {"x": "x", "y": "y", "z": "z"}}
_VTK = {
    "axes": ["z", "y", "x", "c"],
    "velocity": "cell/U",
    "pressure": "cell/p",
    "spacing": None,
    "coordinates": {axis: f"cell/{axis}" for axis in "xyz"},
    "time": None,
    "time_step": 0.25,
}


def mapping_of(one: Set, folder: Path) -> dict[str, Any]:
    """The mapping of a set whose files are in ``folder``."""
    tree = {**_COMMON, **one.mapping}
    tree["files"] = {"train": [[f"{folder}/{name}" for name in tree.pop("names")]]}
    return {key: value for key, value in tree.items() if value is not None}


def flow() -> Arrays:
    """Velocity u, v, w and pressure p [T, X, Y, Z] in float32, and the time of each snapshot."""
    rng = np.random.default_rng(0)
    fields = {name: rng.standard_normal((T, *GRID)).astype(np.float32) for name in "uvwp"}
    return {**fields, "time": 0.25 * np.arange(T)}


def make_sets(folder: Path) -> list[Set]:
    """Write the files of every set in ``folder``, and return them. Formats whose package is missing are left out."""
    sets = [*_numpy(folder), *_hdf5(folder), *_netcdf(folder), *_tiff(folder), *_matlab(folder)]
    for package, make in (("zarr", _zarr), ("vtk", _vtk)):
        try:
            __import__(package)
        except ImportError:
            continue
        sets += make(folder)
    return sets


def _set(kind: str, root: Path, mutable: list[str] | None = None, **mapping: Any) -> Set:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    files = {str(path.relative_to(root)): path.read_bytes() for path in paths}
    return Set(root.name, kind, files, mutable or list(files), {"names": list(files), **mapping})


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _numpy(folder: Path) -> list[Set]:
    plain, packed, single = (_new(folder, name) for name in ("npz", "npz_compressed", "npy"))
    np.savez(plain / "a.npz", **flow())  # type: ignore[arg-type]
    np.savez_compressed(packed / "a.npz", **flow())  # type: ignore[arg-type]
    for name, values in flow().items():
        np.save(single / f"{name}.npy", np.asfortranarray(values) if name == "v" else values)
    return [_set("npz", plain), _set("npz", packed), _set("npy", single)]


def _hdf5(folder: Path) -> list[Set]:
    layouts: dict[str, tuple[Any, dict[str, Any]]] = {
        "hdf5": ("earliest", {}),
        "hdf5_new": ("latest", {}),
        "hdf5_gzip": ("earliest", {"chunks": (1, *GRID), "compression": "gzip", "shuffle": True, "fletcher32": True}),
        "hdf5_lzf_new": ("latest", {"chunks": (1, 4, 8, 8), "compression": "lzf", "maxshape": (None, *GRID)}),
    }
    found = []
    for name, (version, storage) in layouts.items():
        root = _new(folder, name)
        with h5py.File(root / "a.h5", "w", libver=version) as file:
            for key, values in flow().items():
                file.create_dataset(key, data=values, **(storage if values.ndim > 1 else {}))
            for axis in "xyz":
                file[axis] = 0.5 * np.arange(8)
        found.append(_set("hdf5", root, **_POINTS))
    return found


def _netcdf(folder: Path) -> list[Set]:
    found = []
    for version in ("NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF4", "NETCDF4_CLASSIC"):
        root = _new(folder, version.lower())
        with netCDF4.Dataset(root / "a.nc", "w", format=version) as file:
            for name, size in (("time", None), ("x", 8), ("y", 8), ("z", 8)):
                file.createDimension(name, size)
            for name, values in flow().items():
                packed, axes = name == "u", ("time", "x", "y", "z")
                variable = file.createVariable(
                    name,
                    "i2" if packed else values.dtype,
                    axes if values.ndim > 1 else ("time",),
                    fill_value=-32767 if packed else None,
                )
                variable.units = {"p": "m2 s-2", "time": "seconds since 2000-01-01"}.get(name, "m/s")
                if packed:
                    variable.scale_factor, variable.add_offset = 0.0005, 0.25
                    variable.valid_range = np.array([-32000, 32000], "i2")
                if name == "v":
                    variable.missing_value = np.float32(1e20)
                variable[:] = values
            for axis in "xyz":
                variable = file.createVariable(axis, "f8", (axis,))
                variable.units = "m"
                variable[:] = 0.5 * np.arange(8)
        found.append(_set("netcdf", root, **_POINTS))
    return found


def _tiff(folder: Path) -> list[Set]:
    found, values = [], flow()["u"]
    for name, storage in (("tiff", {}), ("tiff_zlib", {"compression": "zlib", "predictor": False})):
        root = _new(folder, name)
        tifffile.imwrite(root / "a.tif", values, photometric="minisblack", **storage)
        names: dict[str, Any] = {"velocity": ["image"] * 3, "pressure": "image"}
        found.append(_set("tiff", root, **names, time=None, time_step=0.25))
    return found


def _matlab(folder: Path) -> list[Set]:
    found = []
    for name, packed in (("matlab", False), ("matlab_compressed", True)):
        root = _new(folder, name)
        savemat(root / "a.mat", flow(), do_compression=packed)
        found.append(_set("matlab", root))
    return found


def _zarr(folder: Path) -> list[Set]:
    import zarr

    found = []
    for version in (2, 3):
        root = _new(folder, f"zarr_{version}")
        group = zarr.open_group(str(root / "a.zarr"), mode="w", zarr_format=version)
        for name, values in flow().items():
            chunks = (1, *GRID) if values.ndim > 1 else (T,)
            group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)[:] = values
        one = _set("zarr", root)
        # One chunk of each array and all metadata, which would otherwise be few among many chunks.
        mutable = [name for name in one.files if name.endswith(("json", ".zarray", ".zattrs", ".zgroup", "0.0.0.0"))]
        mutable += [name for name in one.files if name.endswith("c/0/0/0/0")]
        found.append(Set(one.name, one.kind, one.files, mutable, {"names": ["a.zarr"]}))
    return found


def _vtk(folder: Path) -> list[Set]:
    from vtkmodules import vtkIOLegacy, vtkIOXML
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData, vtkRectilinearGrid

    values, found = flow(), []
    for layout in ("vti_appended", "vti_binary", "vti_ascii", "vtr_zlib", "vtk_binary", "vtk_ascii", "mha"):
        root, ending = _new(folder, layout), layout.partition("_")[0]
        for number in range(T):
            velocity = np.stack([values[name][number] for name in "uvw"])
            image: Any = vtkImageData()
            image.SetSpacing(0.5, 0.5, 0.5)
            image.SetDimensions(9, 9, 9)
            if ending == "mha":
                _write_volume(root / f"a_{number}.{ending}", values["u"][number])
                continue
            if ending == "vtr":
                image = vtkRectilinearGrid()
                image.SetDimensions(9, 9, 9)
                for axis in "XYZ":
                    getattr(image, f"Set{axis}Coordinates")(numpy_to_vtk(0.5 * np.arange(9), deep=True))
            for name, one in (("U", velocity.T.reshape(-1, 3)), ("p", values["p"][number].T.reshape(-1))):
                array = numpy_to_vtk(np.ascontiguousarray(one), deep=True)
                array.SetName(name)
                image.GetCellData().AddArray(array)
            if ending == "vtk":
                writer: Any = vtkIOLegacy.vtkDataSetWriter()
                writer.SetFileType(1 if layout.endswith("ascii") else 2)
            else:
                kind = "RectilinearGrid" if ending == "vtr" else "ImageData"
                writer = getattr(vtkIOXML, f"vtkXML{kind}Writer")()
                getattr(writer, f"SetDataModeTo{'Binary' if ending == 'vtr' else layout.partition('_')[2].title()}")()
                writer.SetEncodeAppendedData(False)
                if ending == "vti":
                    writer.SetCompressorTypeToNone()
            writer.SetInputData(image)
            writer.SetFileName(str(root / f"a_{number}.{ending}"))
            assert writer.Write() == 1
        if ending == "mha":
            names = {"velocity": ["values"] * 3, "pressure": "values", "axes": ["z", "y", "x"], "time_step": 0.25}
            found.append(_set("volume", root, [f"a_0.{ending}"], **names, time=None))
        else:
            found.append(_set("vtk", root, [f"a_0.{ending}"], **_VTK))
    return found


def _write_volume(path: Path, values_XYZ: np.ndarray) -> None:
    head = "ObjectType = Image\nNDims = 3\nDimSize = 8 8 8\nElementSpacing = 0.5 0.5 0.5\nElementType = MET_FLOAT\n"
    head += "ElementByteOrderMSB = False\nElementDataFile = LOCAL\n"
    path.write_bytes(head.encode() + values_XYZ.T.tobytes())


def read_by_owner(folder: Path, kind: str) -> Arrays:
    """Read a set with the library that owns its format.

    Returns:
        u, v, w, p [T, X, Y, Z] in float64 with NaN for missing values, and where the set has them time [T] and the
        coordinates x, y, z.

    Raises:
        Exception: whatever the library raises.
    """
    return {name: np.array(values) for name, values in globals()[f"_read_{kind}"](folder).items()}


def _read_npz(folder: Path) -> Arrays:
    with np.load(folder / "a.npz") as file:
        return {name: file[name] for name in flow()}


def _read_npy(folder: Path) -> Arrays:
    return {name: np.load(folder / f"{name}.npy") for name in flow()}


def _read_hdf5(folder: Path) -> Arrays:
    with h5py.File(folder / "a.h5") as file:
        return {name: file[name][()] for name in (*flow(), *"xyz")}


def _read_netcdf(folder: Path) -> Arrays:
    with netCDF4.Dataset(folder / "a.nc") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {name: file[name][...] for name in (*flow(), *"xyz")}
    return {name: np.ma.filled(one.astype(np.float64), np.nan) for name, one in values.items()}


def _read_tiff(folder: Path) -> Arrays:
    values = tifffile.imread(folder / "a.tif")
    return dict.fromkeys("uvwp", values)


def _read_matlab(folder: Path) -> Arrays:
    found = loadmat(folder / "a.mat")
    return {name: found[name] if name != "time" else np.ravel(found[name]) for name in flow()}


def _read_zarr(folder: Path) -> Arrays:
    import zarr

    group = zarr.open_group(str(folder / "a.zarr"), mode="r")
    return {name: np.asarray(group[name][...]) for name in flow()}


def _read_vtk(folder: Path) -> Arrays:
    from vtkmodules import vtkIOLegacy, vtkIOXML
    from vtkmodules.util.numpy_support import vtk_to_numpy

    parts = []
    for path in sorted(folder.glob("a_*.v*")):
        reader: Any = {
            ".vti": vtkIOXML.vtkXMLImageDataReader,
            ".vtr": vtkIOXML.vtkXMLRectilinearGridReader,
            ".vtk": vtkIOLegacy.vtkDataSetReader,
        }[path.suffix]()
        if path.suffix == ".vtk":  # otherwise only the first array of each kind
            reader.ReadAllVectorsOn()
            reader.ReadAllScalarsOn()
            reader.ReadAllFieldsOn()
        data = _vtk_output(path, reader)
        nx, ny, nz = (size - 1 for size in data.GetDimensions())
        found = {name: vtk_to_numpy(data.GetCellData().GetArray(name)) for name in ("U", "p")}
        velocity = found["U"].reshape(nz, ny, nx, 3).transpose(3, 2, 1, 0)
        low = np.array(data.GetCell(0).GetBounds()).reshape(3, 2).mean(1)
        high = np.array(data.GetCell(data.GetNumberOfCells() - 1).GetBounds()).reshape(3, 2).mean(1)
        points = {axis: np.linspace(low[a], high[a], (nx, ny, nz)[a]) for a, axis in enumerate("xyz")}
        fields = dict(zip("uvw", velocity, strict=True))
        parts.append({**fields, "p": found["p"].reshape(nz, ny, nx).transpose(2, 1, 0), **points})
    return {
        name: parts[0][name] if name in "xyz" else np.stack([part[name] for part in parts])
        for name in (*"uvwp", *"xyz")
    }


def _read_volume(folder: Path) -> Arrays:
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkIOImage import vtkMetaImageReader

    parts = []
    for path in sorted(folder.glob("a_*")):
        data = _vtk_output(path, vtkMetaImageReader())
        values = vtk_to_numpy(data.GetPointData().GetScalars())
        parts.append(values.reshape(data.GetDimensions()[::-1]).transpose(2, 1, 0))
    return dict.fromkeys("uvwp", np.stack(parts))


def _vtk_output(path: Path, reader: Any) -> Any:
    errors: list[str] = []
    reader.AddObserver("ErrorEvent", lambda source, event: errors.append(event))
    reader.SetFileName(str(path))
    reader.Update()
    if errors or reader.GetErrorCode():
        raise ValueError(f"VTK reports an error on {path.name}")
    return reader.GetOutput()
