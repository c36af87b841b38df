"""A common interface to arrays in HDF5, NetCDF and npz files: list names, get shapes, read parts."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import netcdf_file

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.packed_values import ATTRIBUTES, Packing, packing

Part = tuple[int | slice, ...]


@dataclass(frozen=True)
class Array:
    """One stored array.

    Attributes:
        path, name: its file, and its name in the file.
        shape: its shape.
        raw: reads a part, given an index or a slice for each axis, in the stored dtype.
        packing: how stored numbers become values, as NetCDF attributes state it; None: they are the values.
        attributes: its attributes that may state a time or units, with names in lower case.
        dimensions: names of its axes, "" where one has none; empty if the file has no such names.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    raw: Callable[[Part], Any] = field(repr=False)
    packing: Packing | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    dimensions: tuple[str, ...] = ()

    def read(self, part: Part) -> NDArray[np.float64]:
        """Read a part as float64; packed NetCDF values are unpacked, missing values become NaN.

        Raises:
            UserError: this part of the file is damaged.
        """
        try:
            stored = np.asarray(self.raw(part))
            return stored.astype(np.float64) if self.packing is None else self.packing.values(stored)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot read {self.name} ({_first_line(error)}): copy it again") from error


class ArrayFile:
    """An open file: the names of its arrays, a function that opens each of them, and attributes as in `Array`."""

    def __init__(self, path: Path, arrays: dict[str, Callable[[], Array]], attributes: dict[str, Any] | None = None):
        self.path, self._arrays, self.attributes = path, arrays, attributes or {}
        self._open: dict[str, Array] = {}

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def array(self, name: str) -> Array:
        """Return an array by name. Raises `UserError` if it does not contain real numbers."""
        if name not in self._open:
            self._open[name] = self._arrays[name]()
        return self._open[name]


@contextmanager
def open_array_file(path: Path) -> Iterator[ArrayFile]:
    """Open an HDF5, NetCDF or npz file; the first bytes determine the format.

    Raises:
        UserError: the file is missing, damaged, or has another format.
    """
    with ExitStack() as stack:
        try:
            with open(path, "rb") as file:
                start = file.read(4)
            if start[:3] == b"CDF" and start[3:] in (b"\x01", b"\x02"):
                opened = _netcdf(path, stack)
            elif start[:2] == b"PK":
                opened = _npz(path, stack)
            elif h5py.is_hdf5(path):
                opened = _hdf5(path, stack)
            else:
                raise UserError(
                    f"{path} is not HDF5, NetCDF 3 or 4, or npz: convert it (NetCDF 5: `nccopy -k nc4 in.nc out.nc`)"
                )
        except (OSError, ValueError, TypeError, KeyError, IndexError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise UserError(f"cannot read {path} ({reason}): check the path or copy the file again") from error
        yield opened


def _hdf5(path: Path, stack: ExitStack) -> ArrayFile:
    file = stack.enter_context(h5py.File(path, "r"))
    arrays: dict[str, Callable[[], Array]] = {}

    def take(group: h5py.Group, prefix: str, depth: int) -> None:
        for name in group:
            # Ignore soft and external links, which may lead to any file on this machine.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Group) and depth < 8:
                take(item, f"{prefix}{name}/", depth + 1)
            elif isinstance(item, h5py.Dataset) and not _is_bare_dimension(item):
                arrays[prefix + name] = partial(_hdf5_array, path, prefix + name, item)

    take(file, "", 0)
    return ArrayFile(path, arrays, _attributes(file))


def _hdf5_array(path: Path, name: str, dataset: h5py.Dataset) -> Array:
    _require_numbers(path, name, dataset.dtype)
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {name} keeps its values in other files: copy them into one with h5repack")
    attributes = {key: dataset.attrs[key] for key in ATTRIBUTES if key in dataset.attrs}
    # The first is in files of the last ten years, the second in variables of older ones.
    netcdf = "_NCProperties" in dataset.file.attrs or "DIMENSION_LIST" in dataset.attrs
    packed = packing(f"{path}: {name}", attributes, dataset.dtype, netcdf)
    about = _attributes(dataset), _dimensions(dataset)
    return Array(path, name, tuple(dataset.shape), lambda part: dataset[part], packed, *about)


def _is_bare_dimension(dataset: h5py.Dataset) -> bool:
    """Whether NetCDF 4 stores a dimension without coordinates in a dataset, whose values mean nothing."""
    note = dataset.attrs["NAME"] if "CLASS" in dataset.attrs and "NAME" in dataset.attrs else b""
    return isinstance(note, bytes) and note.startswith(b"This is a netCDF dimension but not a netCDF variable")


def _dimensions(dataset: h5py.Dataset) -> tuple[str, ...]:
    names = []
    if "DIMENSION_LIST" in dataset.attrs:
        with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
            names = [one[0].name.rpartition("/")[2] if len(one) else "" for one in dataset.dims]
    return tuple(names)


def _attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    # Read only these attributes; others may be references or of excessive size.
    return {key.lower(): item.attrs[key] for key in item.attrs if key.lower() in _READ}


def _netcdf(path: Path, stack: ExitStack) -> ArrayFile:
    file = stack.enter_context(netcdf_file(path, "r", mmap=True))

    def array(name: str) -> Array:
        variable = file.variables[name]
        _require_numbers(path, name, variable.data.dtype)
        attributes = {key: getattr(variable, key) for key in ATTRIBUTES if hasattr(variable, key)}
        packed = packing(f"{path}: {name}", attributes, variable.data.dtype, netcdf=True)

        # Look the variable up each time: holding a mapped array would keep the file open.
        def read(part: Part) -> Any:
            return np.array(file.variables[name].data[part])

        about = {key: getattr(variable, key) for key in _READ if hasattr(variable, key)}, tuple(variable.dimensions)
        return Array(path, name, tuple(variable.data.shape), read, packed, *about)

    return ArrayFile(path, {name: partial(array, name) for name in file.variables})


def _npz(path: Path, stack: ExitStack) -> ArrayFile:
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {name[:-4]: name for name in archive.namelist() if name.endswith(".npy")}

    def array(name: str) -> Array:
        stream = stack.enter_context(archive.open(members[name]))
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        _require_numbers(path, name, dtype)
        start = stream.tell()

        def read(part: Part) -> Any:
            # Read single entries of the first axis if possible: an array may be larger than memory.
            count, first = int(np.prod(shape)), 0
            if part and isinstance(part[0], int) and not fortran:
                count //= max(shape[0], 1)
                first, inner, part = part[0] * count * dtype.itemsize, shape[1:], part[1:]
            else:
                inner = shape[::-1] if fortran else shape
            stream.seek(start + first)
            block = stream.read(count * dtype.itemsize)
            if len(block) != count * dtype.itemsize:
                raise EOFError("it ends too early")
            values = np.frombuffer(block, dtype).reshape(inner)
            return (values.T if fortran else values)[part]

        return Array(path, name, tuple(shape), read)

    return ArrayFile(path, {name: partial(array, name) for name in members})


_READ = ("time", "times", "t", "units")


def _require_numbers(path: Path, name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 16:
        raise UserError(f"{path}: {name} holds {dtype}, expected real numbers")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
