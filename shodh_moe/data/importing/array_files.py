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
from shodh_moe.base.hdf5_filters import require_filters
from shodh_moe.base.text import printable
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
        except UserError:
            raise
        except Exception as error:  # whatever a library raises
            raise _unreadable(self.path, self.name, error) from error


class ArrayFile:
    """An open file: the names of its arrays, a function that opens each of them, and attributes as in `Array`.

    Attributes:
        path: the file.
        unusable: what the other names in the file are, which cannot be read, to complete "NAME is ...".
        attributes: as in `Array`.
        in_memory: whether arrays that were opened are in memory, so that only few files should be open.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, Callable[[], Array]],
        attributes: dict[str, Any] | None = None,
        unusable: dict[str, str] | None = None,
        in_memory: bool = False,
    ):
        self.path, self._arrays = path, arrays
        self.attributes, self.unusable, self.in_memory = attributes or {}, unusable or {}, in_memory
        self._open: dict[str, Array] = {}

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def array(self, name: str) -> Array:
        """Return an array by name. Raises `UserError` if it does not contain real numbers, or is damaged."""
        if name not in self._open:
            try:
                self._open[name] = self._arrays[name]()
            except UserError:
                raise
            except Exception as error:  # whatever a library raises
                raise _unreadable(self.path, name, error) from error
        return self._open[name]

    def seen_through(self, view: Callable[[Array], Array]) -> ArrayFile:
        """The same file, each of whose arrays is passed through ``view``."""

        def opener(name: str) -> Callable[[], Array]:
            return lambda: view(self.array(name))

        return ArrayFile(
            self.path, {name: opener(name) for name in self._arrays}, self.attributes, self.unusable, self.in_memory
        )


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
        except UserError:
            raise
        except Exception as error:  # whatever a library raises, such as MemoryError for a damaged length
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise UserError(f"cannot read {path} ({reason}): check the path or copy the file again") from error
        yield opened


def _hdf5(path: Path, stack: ExitStack) -> ArrayFile:
    file = stack.enter_context(h5py.File(path, "r"))
    arrays: dict[str, Callable[[], Array]] = {}
    links: dict[str, str] = {}

    def take(group: h5py.Group, prefix: str, depth: int) -> None:
        for name in group:
            # Soft and external links are not followed, as they may lead to any file on this machine.
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                there = (
                    f"to {link.path} in {link.filename}" if isinstance(link, h5py.ExternalLink) else f"to {link.path}"
                )
                links[prefix + name] = printable(f"a link {there}; links are not followed: name its target instead")
                continue
            item = group[name]
            if isinstance(item, h5py.Group) and depth < 8:
                take(item, f"{prefix}{name}/", depth + 1)
            elif isinstance(item, h5py.Dataset) and not _is_bare_dimension(item):
                arrays[prefix + name] = partial(_hdf5_array, path, prefix + name, item)

    take(file, "", 0)
    return ArrayFile(path, arrays, _attributes(file), links)


def _hdf5_array(path: Path, name: str, dataset: h5py.Dataset) -> Array:
    require_numbers(path, name, dataset.dtype)
    if dataset.shape is None:
        raise UserError(f"{path}: {name} is empty (a null dataspace): write the values again")
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {name} keeps its values in other files: copy them into one with h5repack")
    require_filters(path, name, dataset)
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
    return {key.lower(): item.attrs[key] for key in item.attrs if key.lower() in READ_ATTRIBUTES}


def _netcdf(path: Path, stack: ExitStack) -> ArrayFile:
    file = stack.enter_context(netcdf_file(path, "r", mmap=True))

    def array(name: str) -> Array:
        variable = file.variables[name]
        require_numbers(path, name, variable.data.dtype)
        attributes = {key: getattr(variable, key) for key in ATTRIBUTES if hasattr(variable, key)}
        packed = packing(f"{path}: {name}", attributes, variable.data.dtype, netcdf=True)

        # Look the variable up each time: holding a mapped array would keep the file open.
        def read(part: Part) -> Any:
            return np.array(file.variables[name].data[part])

        about = (
            {key: getattr(variable, key) for key in READ_ATTRIBUTES if hasattr(variable, key)},
            tuple(variable.dimensions),
        )
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
        require_numbers(path, name, dtype)
        start = stream.tell()

        def read(part: Part) -> Any:
            # Read single entries of the first axes if possible: an array may be larger than memory.
            count, first, inner = int(np.prod(shape)), 0, shape
            while part and isinstance(part[0], int) and not fortran:
                count //= max(inner[0], 1)
                first, inner, part = first + part[0] * count * dtype.itemsize, inner[1:], part[1:]
            if fortran:
                inner = shape[::-1]
            stream.seek(start + first)
            block = stream.read(count * dtype.itemsize)
            if len(block) != count * dtype.itemsize:
                raise EOFError("it ends too early")
            values = np.frombuffer(block, dtype).reshape(inner)
            return (values.T if fortran else values)[part]

        return Array(path, name, tuple(shape), read)

    return ArrayFile(path, {name: partial(array, name) for name in members})


READ_ATTRIBUTES = ("time", "times", "t", "units")


def require_numbers(path: Path, name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 16:
        raise UserError(f"{path}: {name} holds {dtype}, expected real numbers")


def _unreadable(path: Path, name: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot read {name} ({printable(_first_line(error))[:200]}): copy it again")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
