"""Reading chunks without HDF5's filters: the same values, and no crash on data of the wrong size."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shodh_moe.data.checksum import fletcher32
from shodh_moe.data.unpacking import read_gzip


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1"])
@pytest.mark.parametrize("more", [{}, {"shuffle": True}, {"fletcher32": True}, {"shuffle": True, "fletcher32": True}])
@pytest.mark.parametrize("chunks", [(1, 2, 3, 4), (2, 3, 5, 7), (1, 1, 5, 7)])
def test_values_equal_those_that_the_library_reads(
    tmp_path: Path, dtype: str, more: dict[str, Any], chunks: tuple[int, ...]
) -> None:
    expected = np.random.default_rng(0).integers(0, 99, (2, 3, 5, 7)).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", data=expected, chunks=chunks, compression="gzip", **more)
        for first, stop in [((), ()), ((1,), (2,)), ((0, 1), (1, 3))]:
            got = read_gzip(dataset, first, stop)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected[tuple(map(slice, first, stop))])


@pytest.mark.parametrize("size", [2, 3, 254, 255, 4096, 100_001])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_the_checksum_equals_the_librarys(tmp_path: Path, size: int, fill: int | None) -> None:
    values = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    values = values if fill is None else np.full(size, fill, np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", data=values, chunks=(size,), fletcher32=True)
        _, raw = dataset.id.read_direct_chunk((0,))
    assert fletcher32(values) == int.from_bytes(raw[-4:], "little")


@pytest.mark.parametrize(
    "stored",
    [zlib.compress(bytes(8)), zlib.compress(bytes(401)), zlib.compress(bytes(405)), zlib.compress(bytes(10**6)),
     zlib.compress(bytes(400))[:-3], b"x" * 20],
)  # fmt: skip
def test_data_of_the_wrong_size_is_refused(tmp_path: Path, stored: bytes) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", (100,), "f4", chunks=(100,), compression="gzip")
        dataset.id.write_direct_chunk((0,), stored)
        with pytest.raises(OSError, match="filter"):
            read_gzip(dataset, (), ())
