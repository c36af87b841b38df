"""Damage that the importer's libraries do not notice by themselves is refused; found by the fuzz of the importer."""

from __future__ import annotations

import struct
from pathlib import Path

import netCDF4
import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.formats import open_file

VALUES = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)


def read(path: Path, name: str = "u") -> np.ndarray:
    with open_file(path) as file:
        return np.stack([file.array(name).read((index, slice(None))) for index in range(4)])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_checksum_of_an_npz_array_is_compared(tmp_path: Path, save: object) -> None:
    path = tmp_path / "a.npz"
    save(path, u=VALUES)  # type: ignore[operator]
    np.testing.assert_array_equal(read(path), VALUES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # amid the values
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: cannot read u \("):
        read(path)


def test_netcdf_variables_that_overlap_are_refused(tmp_path: Path) -> None:
    """The netCDF4 library refuses the file; scipy reads the second variable from the first one's place."""
    path = tmp_path / "a.nc"
    with netCDF4.Dataset(path, "w", format="NETCDF3_CLASSIC") as file:
        file.createDimension("t", 4)
        file.createDimension("x", 100)
        for name, factor in (("v", 2), ("u", 1)):
            file.createVariable(name, "f4", ("t", "x"))[:] = factor * VALUES
    np.testing.assert_array_equal(read(path), VALUES)
    content = path.read_bytes()
    first, second = (struct.pack(">i", content.index((n * VALUES).astype(">f4").tobytes())) for n in (2, 1))
    assert content.count(second) == 1
    path.write_bytes(content.replace(second, first))
    with pytest.raises(UserError, match=r"a\.nc \(the places of its variables overlap\)"):
        read(path)
    with pytest.raises(OSError, match="Unknown file format"):
        netCDF4.Dataset(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_blosc_chunk_that_is_too_short_is_refused(tmp_path: Path, version: int) -> None:
    """Blosc reads what comes after it in memory."""
    zarr = pytest.importorskip("zarr", minversion="3")
    path = tmp_path / "a.zarr"
    storage = {} if version == 2 else {"compressors": zarr.codecs.BloscCodec()}
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    group.create_array("u", shape=VALUES.shape, chunks=(1, 100), dtype="f4", **storage)[:] = VALUES
    np.testing.assert_array_equal(read(path), VALUES)
    chunk = path / ("u/2.0" if version == 2 else "u/c/2/0")
    chunk.write_bytes(chunk.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.zarr: cannot read u \(a chunk has \d+ of \d+ bytes\)"):
        read(path)
