"""Zarr folders (formats 2 and 3), by zarr: arrays are named as in HDF5, group/name."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import register_codec
from numcodecs.blosc import Blosc
from numcodecs.compat import ensure_contiguous_ndarray

from shodh_moe.formats.arrays import READ_ATTRIBUTES, Array, ArrayFile, plain, require_numbers
from shodh_moe.formats.packed_values import ATTRIBUTES, packing


class _CheckedBlosc(Blosc):  # type: ignore[misc]
    """Blosc, whose library reads beyond the end of a chunk that is shorter than its header says."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        content = ensure_contiguous_ndarray(buf).view("u1")
        stated = int.from_bytes(content[12:16].tobytes(), "little")
        if len(content) < max(stated, 16):
            raise ValueError(f"a chunk has {len(content)} of {stated} bytes")
        return super().decode(buf, out)


register_codec(_CheckedBlosc, codec_id=Blosc.codec_id)  # for format 2
if hasattr(zarr, "codecs"):
    zarr.codecs.blosc.Blosc = _CheckedBlosc  # for format 3


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
    attributes = dict(stored.attrs)
    packed = packing(f"{path}: {name}", _packing_attributes(stored), stored.dtype, netcdf=False)
    stated = plain({key.lower(): value for key, value in attributes.items() if key.lower() in READ_ATTRIBUTES})
    dimensions = (
        attributes.get("_ARRAY_DIMENSIONS") or getattr(getattr(stored, "metadata", None), "dimension_names", None) or ()
    )
    names = tuple(str(one or "") for one in dimensions)
    return Array(path, name, tuple(stored.shape), lambda part: np.asarray(stored[part]), packed, stated, names)


def _packing_attributes(stored: Any) -> dict[str, Any]:
    """Return the NetCDF attributes of an array, with the missing value where xarray keeps it."""
    found = {key: value for key, value in dict(stored.attrs).items() if key in ATTRIBUTES}
    if "_ARRAY_DIMENSIONS" in stored.attrs and stored.fill_value is not None:
        found.setdefault("_FillValue", stored.fill_value)  # in format 2
    if isinstance(text := found.get("_FillValue"), str) and len(text) == 12:
        with suppress(ValueError):
            found["_FillValue"] = struct.unpack("<d", base64.b64decode(text, validate=True))[0]  # in format 3
    return found
