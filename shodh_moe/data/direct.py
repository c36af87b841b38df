"""Read snapshots directly from their byte offsets in a file, without the HDF5 library and its lock.

The library serialises all reads of a process, and its results still have to be reordered. Here threads read in
parallel, and values are reordered and checked while they are in the processor's cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.remote_file import pointed_at
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import LARGEST, TrajectoryRecord
from shodh_moe.kernels.compiled import compiled

# Values read at a time, a multiple of 3; few enough to stay in the processor's cache until they are reordered.
_BLOCK = 3 * 2**16
# Without the sign, float32 bit patterns sort like magnitudes; infinity and NaN come last.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_TOO_LARGE = np.float32(LARGEST).view(np.uint32)


@dataclass(frozen=True)
class Places:
    """Byte offsets of a trajectory's native float32 values in its file, as contiguous pieces.

    Attributes:
        stamp: identifies the version of the file that these offsets belong to.
        velocity_TP: byte offsets [T, P] of the P pieces of each snapshot's velocity [X, Y, Z, 3].
        pressure_TP: byte offsets [T, P] of the P pieces of each snapshot's pressure [X, Y, Z].
    """

    stamp: tuple[int, ...]
    velocity_TP: NDArray[np.int64]
    pressure_TP: NDArray[np.int64]


def find_places(record: TrajectoryRecord) -> Places | None:
    """Find the byte offsets of a trajectory; None if only the HDF5 library can read it.

    That is the case for values that are compressed, checksummed, in another number format, never written, or stored in
    another file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        before = _stamp(os.stat(record.path))
        if pointed_at(record.path) is not None:
            return None
    except OSError:
        return None
    with opened(record.path) as file:
        # A user block would shift all offsets.
        if file.userblock_size:
            return None
        shape = (record.n_snapshots, *record.grid)
        velocity_TP = _pieces(file, "t1_fields/velocity", record.sample, (*shape, 3))
        pressure_TP = _pieces(file, "t0_fields/pressure", record.sample, shape)
        if velocity_TP is None or pressure_TP is None:
            return None
        return Places(before, velocity_TP, pressure_TP)


def read_places(path: Path, places: Places, snapshot: int, out_4XYZ: NDArray[np.float32]) -> bool:
    """Read velocity and pressure of a snapshot into a contiguous array.

    Returns:
        Whether the file is unchanged, reading succeeded, and all values pass the check of `reading.require_sound`. If
        not, the content of ``out_4XYZ`` is undefined.
    """
    bits_4N = out_4XYZ.reshape(4, -1).view(np.uint32)
    try:
        with open(path, "rb", buffering=0) as file:
            return (
                _stamp(os.fstat(file.fileno())) == places.stamp
                and _read_vectors(file, places.velocity_TP[snapshot], bits_4N[:3])
                and _read_scalars(file, places.pressure_TP[snapshot], bits_4N[3])
            )
    except OSError:
        return False


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """A value that changes whenever the file is replaced or modified."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _pieces(file: h5py.File, name: str, sample: int, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Byte offsets [T, P] of one sample's values, shape [T, X, ...]; None unless they are stored unfiltered."""
    dataset, snapshots, cells = file[name], shape[0], shape[1:]
    plain = dataset.dtype == np.dtype("=f4") and not dataset.id.get_create_plist().get_nfilters()
    if not plain or dataset.shape[1:] != shape:
        return None
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:
            return None
        size = 4 * int(np.prod(cells))
        return start + size * (snapshots * sample + np.arange(snapshots, dtype=np.int64)[:, None])
    thick = dataset.chunks[2]
    if dataset.chunks != (1, 1, thick, *cells[1:]) or cells[0] % thick:
        return None
    rest = (0,) * (len(cells) - 1)
    chunks = [
        dataset.id.get_chunk_info_by_coord((sample, snapshot, x, *rest))
        for snapshot in range(snapshots)
        for x in range(0, cells[0], thick)
    ]
    if any(chunk.byte_offset is None for chunk in chunks):
        return None
    return np.array([chunk.byte_offset for chunk in chunks], dtype=np.int64).reshape(snapshots, -1)


def _read_vectors(file: FileIO, offsets_P: NDArray[np.int64], out_3N: NDArray[np.uint32]) -> bool:
    """Read interleaved vectors into their components; False if the file ends or a value is too large."""
    block, size, done = np.empty(_BLOCK, np.uint32), out_3N.size // len(offsets_P), 0
    for offset in offsets_P:
        file.seek(offset)
        for first in range(0, size, _BLOCK):
            part = block[: min(_BLOCK, size - first)]
            if not _filled(file, part) or _split(part, out_3N, done) >= _TOO_LARGE:
                return False
            done += part.size // 3
    return True


def _read_scalars(file: FileIO, offsets_P: NDArray[np.int64], out_N: NDArray[np.uint32]) -> bool:
    """Read scalars; False if the file ends or a value is too large."""
    for offset, piece in zip(offsets_P, np.split(out_N, len(offsets_P)), strict=True):
        file.seek(offset)
        for first in range(0, piece.size, _BLOCK):
            part = piece[first : first + _BLOCK]
            if not _filled(file, part) or _largest(part) >= _TOO_LARGE:
                return False
    return True


def _filled(file: FileIO, values: NDArray[np.uint32]) -> bool:
    """Fill ``values`` with the next bytes of the file; False at its end."""
    left = values.data.cast("B")
    while left:
        count = file.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True


@compiled()
def _split(values_M: NDArray[np.uint32], out_3N: NDArray[np.uint32], start: int) -> np.uint32:
    """Split interleaved vectors into three components from ``start`` on; return the bits of the largest magnitude."""
    count = values_M.size // 3
    x, y, z = out_3N[0, start : start + count], out_3N[1, start : start + count], out_3N[2, start : start + count]
    worst = np.uint32(0)
    for i in range(count):
        a, b, c = values_M[3 * i], values_M[3 * i + 1], values_M[3 * i + 2]
        x[i], y[i], z[i] = a, b, c
        worst = max(worst, a & _MAGNITUDE, b & _MAGNITUDE, c & _MAGNITUDE)
    return worst


@compiled()
def _largest(values_M: NDArray[np.uint32]) -> np.uint32:
    """Return the bits of the largest magnitude."""
    worst = np.uint32(0)
    for i in range(values_M.size):
        worst = max(worst, values_M[i] & _MAGNITUDE)
    return worst


@compiled()
def unpack_bits(bits_M: NDArray[np.uint8], out_N: NDArray[np.float32]) -> None:
    """Unpack the result of `numpy.packbits` into zeros and ones."""
    whole = out_N.size // 8
    for i in range(whole):
        for k in range(8):
            out_N[8 * i + k] = (bits_M[i] >> (7 - k)) & 1
    for k in range(out_N.size - 8 * whole):
        out_N[8 * whole + k] = (bits_M[whole] >> (7 - k)) & 1
