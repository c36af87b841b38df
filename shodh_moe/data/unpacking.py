"""Read gzip-compressed chunks without HDF5's filters.

HDF5 (seen with 2.0) does not check the size of an unpacked chunk. If the data are too short, it copies from beyond its
buffer, and the process crashes.
"""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

_GZIP, _SHUFFLE, _CHECKSUM = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32


def filters_of(dataset: h5py.Dataset) -> list[int]:
    """List the codes of a dataset's filters, in the order in which they were applied."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]


def read_gzip(dataset: h5py.Dataset, first: tuple[int, ...], stop: tuple[int, ...]) -> NDArray[Any]:
    """Read the range [first, stop) of the leading axes and all of the other axes, in the dataset's dtype.

    Raises:
        OSError: a chunk is missing, its checksum is wrong, or it does not unpack to its size.
    """
    filters, chunks = filters_of(dataset), dataset.chunks
    first = first + (0,) * (dataset.ndim - len(first))
    stop = stop + dataset.shape[len(stop) :]
    out = np.empty([b - a for a, b in zip(first, stop, strict=True)], dtype=dataset.dtype)
    starts = [range(a // size * size, b, size) for a, b, size in zip(first, stop, chunks, strict=True)]
    for corner in itertools.product(*starts):
        mask, raw = dataset.id.read_direct_chunk(corner)
        applied = [code for bit, code in enumerate(filters) if not mask >> bit & 1]
        values = np.frombuffer(_unpacked(raw, applied, math.prod(chunks), dataset.dtype.itemsize), dtype=dataset.dtype)
        # The overlap of this chunk and the requested range, in the coordinates of each.
        common = [(max(a, c), min(b, c + n)) for a, b, c, n in zip(first, stop, corner, chunks, strict=True)]
        here = tuple(slice(low - a, high - a) for (low, high), a in zip(common, first, strict=True))
        there = tuple(slice(low - c, high - c) for (low, high), c in zip(common, corner, strict=True))
        out[here] = values.reshape(chunks)[there]
    return out


def _unpacked(raw: bytes, filters: list[int], count: int, itemsize: int) -> bytes:
    """Undo ``filters`` on a chunk of ``count`` values; raise OSError unless it then has exactly their size."""
    for code in reversed(filters):
        if code == _CHECKSUM:
            from shodh_moe.data.checksum import fletcher32  # slow

            raw, stored = raw[:-4], int.from_bytes(raw[-4:], "little")
            if fletcher32(np.frombuffer(raw, dtype=np.uint8)) != stored:
                raise OSError("filter fletcher32: wrong checksum")
        elif code == _GZIP:
            inflate = zlib.decompressobj()
            try:
                # Four more bytes for a checksum that was applied before compression.
                raw = inflate.decompress(raw, count * itemsize + 4)
            except zlib.error as error:
                raise OSError(f"filter deflate: {error}") from error
            if not inflate.eof and inflate.decompress(inflate.unconsumed_tail, 1):
                raise OSError("filter deflate: more values than a chunk has")
            if not inflate.eof:
                raise OSError("filter deflate: no end of the data")
        elif code == _SHUFFLE and len(raw) == count * itemsize:
            raw = np.frombuffer(raw, dtype=np.uint8).reshape(itemsize, count).T.tobytes()
    if len(raw) != count * itemsize:
        raise OSError(f"filter: a chunk of {len(raw)} bytes, expected {count * itemsize}")
    return raw
