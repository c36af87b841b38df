"""Zarr folders (formats 2 and 3), by zarr: arrays are named as in HDF5, group/name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from shodh_moe.data.importing.array_files import Array, ArrayFile, _packing, require_numbers


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the arrays; only the chunks of what is read are loaded. Attributes are those of NetCDF, as xarray writes."""
    root = zarr.open(str(path), mode="r")
    found = _arrays(root, "") if isinstance(root, zarr.Group) else [(path.stem, root)]
    return ArrayFile(path, {name: _opener(path, name, one) for name, one in found})


def _arrays(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, array in group.arrays():
        yield prefix + name, array
    for name, inner in group.groups():
        yield from _arrays(inner, f"{prefix}{name}/")


def _opener(path: Path, name: str, stored: Any) -> Callable[[], Array]:
    return partial(_array, path, name, stored)


def _array(path: Path, name: str, stored: Any) -> Array:
    require_numbers(path, name, stored.dtype)
    packing = _packing(dict(stored.attrs))
    return Array(path, name, tuple(stored.shape), lambda part: np.asarray(stored[part]), packing)
