"""HDF5, also NetCDF 4 and MATLAB 7.3, which are HDF5: by h5py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.base.hdf5_filters import require_filters
from shodh_moe.base.text import printable
from shodh_moe.formats.arrays import READ_ATTRIBUTES, Array, ArrayFile, plain, require_numbers
from shodh_moe.formats.packed_values import ATTRIBUTES, Packing, packing


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the datasets; links are named as unusable. Only what is read of a dataset is loaded."""
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
                arrays[prefix + name] = partial(_array, path, prefix + name, item)

    take(file, "", 0)
    return ArrayFile(path, arrays, _attributes(file), links)


def _array(path: Path, name: str, dataset: h5py.Dataset) -> Array:
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
    stated = {**_time_of_groups(dataset), **_attributes(dataset)}
    if "openPMD" in dataset.file.attrs and "unitSI" in dataset.attrs and packed is None:
        packed = Packing(dataset.dtype.newbyteorder("="), np.empty(0), factor=float(dataset.attrs["unitSI"]))
        stated["units"] = _openpmd_unit(dataset)
    return Array(path, name, tuple(dataset.shape), lambda part: dataset[part], packed, stated, _dimensions(dataset))


def _time_of_groups(dataset: h5py.Dataset) -> dict[str, Any]:
    """The attribute ``time`` of the nearest group around a dataset that has one, such as an iteration of openPMD.

    openPMD's ``timeUnitSI``, by which it is multiplied, makes it seconds. The root group speaks for the file.
    """
    group = dataset.parent
    while group.name != "/":
        found = {key: value for key, value in _attributes(group).items() if key != "units"}
        if found and "timeUnitSI" in group.attrs:
            unit = float(group.attrs["timeUnitSI"])
            return {**{key: np.ravel(value) * unit for key, value in found.items()}, "time_unit": "s"}
        if found:
            return found
        group = group.parent
    return {}


def _openpmd_unit(dataset: h5py.Dataset) -> str:
    """The unit of values after multiplication by ``unitSI``, such as ``m s-1``; "" if none of mechanics is stated."""
    for item in (dataset, dataset.parent):  # of a scalar record, and of the record with this component
        if "unitDimension" in item.attrs:
            powers = np.ravel(item.attrs["unitDimension"])  # of length, mass, time, current, ...
            if len(powers) == 7 and not powers[3:].any():
                return " ".join(f"{unit}{n:g}" for unit, n in zip(("m", "kg", "s"), powers, strict=False) if n)
    return ""


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
    return plain({key.lower(): item.attrs[key] for key in item.attrs if key.lower() in READ_ATTRIBUTES})
