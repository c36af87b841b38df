"""Reading foreign files, and refusing every kind of bad file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.base.errors import UserError
from shodh_moe.data import (
    domain_names,
    list_trajectories,
    open_trajectories,
    read_provenance,
    read_snapshots,
    read_trajectory,
    write_trajectory,
)
from shodh_moe.solvers import Simulation

T, GRID = 3, (8, 16, 8)


def simulation(seed: int = 0, grid: tuple[int, int, int] = GRID) -> Simulation:
    rng = np.random.default_rng(seed)
    return Simulation(
        velocity_T3XYZ=rng.standard_normal((T, 3, *grid)).astype(np.float32),
        pressure_TXYZ=rng.standard_normal((T, *grid)).astype(np.float32),
        solid_XYZ=rng.random(grid) < 0.3,
        lid=False,
        time_T=np.arange(T, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
    )


def written(folder: Path, domain: str = "open_channel", index: int = 0, split: str = "train") -> Path:
    path = folder / "data" / split / f"{domain}_{index:04d}.hdf5"
    write_trajectory(
        path, simulation(index), dataset_name="test", domain=domain, provenance={"seed": index, "x": [1, 2]}
    )
    return path


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), grid=st.tuples(*[st.sampled_from([1, 2, 5, 8])] * 3))
def test_written_values_are_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, grid: tuple[int, int, int]
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "a.hdf5"
    expected = simulation(seed, grid)
    write_trajectory(path, expected, dataset_name="test", domain="d", provenance={})
    got = read_trajectory(path, grid)
    np.testing.assert_array_equal(got.velocity_T3XYZ, expected.velocity_T3XYZ)
    np.testing.assert_array_equal(got.pressure_T1XYZ[:, 0], expected.pressure_TXYZ)
    np.testing.assert_array_equal(got.solid_1XYZ[0], expected.solid_XYZ)
    assert got.velocity_T3XYZ.dtype == got.pressure_T1XYZ.dtype == got.solid_1XYZ.dtype == np.float32


def test_list_the_trajectories_of_a_folder(tmp_path: Path) -> None:
    for domain in ("porous_media", "open_channel"):
        for index in range(2):
            written(tmp_path, domain, index)
    (tmp_path / "data/train/.half.hdf5").write_bytes(b"")
    records = list_trajectories(tmp_path, "train", GRID)
    assert [(r.domain, r.n_snapshots, r.grid) for r in records] == [("open_channel", T, GRID)] * 2 + [
        ("porous_media", T, GRID)
    ] * 2
    assert domain_names(records) == ["open_channel", "porous_media"]


def test_read_part_of_a_trajectory(tmp_path: Path) -> None:
    (record,) = open_trajectories(written(tmp_path))
    fields, solid = read_snapshots(record, 1, 3)
    np.testing.assert_array_equal(fields[:, :3], simulation().velocity_T3XYZ[1:3])
    assert solid.shape == (1, *GRID)


def test_foreign_files_are_read(tmp_path: Path) -> None:
    """A file with several trajectories, float64, no solid and none of our attributes."""
    path = tmp_path / "other.h5"
    rng = np.random.default_rng(0)
    velocity, pressure = rng.standard_normal((2, T, *GRID, 3)), rng.standard_normal((2, T, *GRID))
    with h5py.File(path, "w") as file:
        file.attrs["dataset_name"] = "turbulence"
        file["t1_fields/velocity"] = velocity
        file["t0_fields/pressure"] = pressure
    records = open_trajectories(path)
    assert [(r.sample, r.domain) for r in records] == [(0, "turbulence"), (1, "turbulence")]
    second = read_trajectory(records[1])
    np.testing.assert_array_equal(second.velocity_T3XYZ, np.moveaxis(velocity[1], -1, 1).astype(np.float32))
    assert not second.solid_1XYZ.any()
    assert read_provenance(path) == {}


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_text(path: Path) -> None:
    path.write_text("time,u,v,w\n" * 100)


def damage_no_velocity(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t1_fields/velocity"]


def damage_pressure_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        file["t0_fields/pressure"] = np.zeros((1, T, 4, 4, 4))


def damage_flat_velocity(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t1_fields/velocity"]
        file["t1_fields/velocity"] = np.zeros((T, *GRID))


def damage_solid_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t0_fields/solid"]
        file["t0_fields/solid"] = np.zeros((4, 4, 4))


def damage_2d(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["n_spatial_dims"] = 2


def damage_nan(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][0, 1, 2, 3, 4, 0] = np.nan


def damage_inf(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t0_fields/pressure"][0, 2, 2, 3, 4] = np.inf


def damage_solid_nan(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t0_fields/solid"][0, 0, 0, 0] = np.nan


def replaced(path: Path, name: str, values: object, **options: object) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, data=values, **options)


def damage_swapped(path: Path) -> None:
    """The bytes are swapped, but the declared byte order is not."""
    replaced(path, "t0_fields/pressure", simulation().pressure_TXYZ[None].byteswap())


def damage_text_field(path: Path) -> None:
    text = np.full((1, T, *GRID), "x", dtype=object)
    replaced(path, "t0_fields/pressure", text, dtype=h5py.string_dtype())


def damage_integers(path: Path) -> None:
    replaced(path, "t1_fields/velocity", np.zeros((1, T, *GRID, 3), dtype=np.int32))


def damage_complex(path: Path) -> None:
    replaced(path, "t1_fields/velocity", np.zeros((1, T, *GRID, 3), dtype=np.complex64))


def damage_no_cells(path: Path) -> None:
    replaced(path, "t1_fields/velocity", np.zeros((1, T, 0, 4, 4, 3), dtype=np.float32))
    replaced(path, "t0_fields/pressure", np.zeros((1, T, 0, 4, 4), dtype=np.float32))


def damage_external_link(path: Path) -> None:
    path.rename(path.with_name("other.bin"))
    with h5py.File(path, "w") as file:
        file["t1_fields"] = h5py.ExternalLink("other.bin", "/t1_fields")


def damage_soft_link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("t1_fields/velocity", "elsewhere")
        file["t1_fields/velocity"] = h5py.SoftLink("/elsewhere")


def damage_external_values(path: Path) -> None:
    path.with_name("values.bin").write_bytes(bytes(4 * T * 8 * 16 * 8))
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        shape, values = (1, T, *GRID), [("values.bin", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("t0_fields/pressure", shape, dtype=np.float32, external=values)


def damage_virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((1, T, *GRID), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "p", (1, T, *GRID))
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        file.create_virtual_dataset("t0_fields/pressure", layout)


def damage_cycle(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t0_fields/again"] = file["/"]


def damage_long_attribute(path: Path) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        file.create_group("notes").attrs["long"] = np.zeros(2**20)


def damage_long_text(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t1_fields"].attrs["note"] = "x" * 2**20


def damage_many_attributes(path: Path) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        for number in range(1100):
            file["t1_fields"].attrs[f"a{number}"] = 1


def damage_other_grid(path: Path) -> None:
    replaced(path, "dimensions/y", np.arange(32, dtype=np.float32))


def damage_negative_spacing(path: Path) -> None:
    replaced(path, "dimensions/x", np.arange(8, 0, -1, dtype=np.float32))


def damage_zero_spacing(path: Path) -> None:
    replaced(path, "dimensions/z", np.zeros(8, dtype=np.float32))


def damage_uneven_spacing(path: Path) -> None:
    replaced(path, "dimensions/z", np.arange(8, dtype=np.float32) ** 1.1)


def damage_time_back(path: Path) -> None:
    replaced(path, "dimensions/time", np.float32([0, 2, 1]))


def damage_time_uneven(path: Path) -> None:
    replaced(path, "dimensions/time", np.float32([0, 1, 3]))


def damage_time_length(path: Path) -> None:
    replaced(path, "dimensions/time", np.arange(T + 1, dtype=np.float32))


def damage_claimed_size(path: Path) -> None:
    """Declares a huge array and writes only one of its chunks."""
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        big = file.create_dataset("t0_fields/pressure", (1, T, 2**20, 2**20, 2**20), chunks=(1, 1, 8, 8, 8), dtype="f4")
        big[0, 0, 0, 0, 0] = 1


def damage_unwritten(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        file.create_dataset("t0_fields/pressure", (1, T, *GRID), chunks=(1, 1, *GRID), dtype="f4")[0, 0] = 1


def damage_filter(path: Path) -> None:
    """Uses a filter that does not exist: only numbers up to 32767 are assigned to filters."""
    with h5py.File(path, "r+") as file:
        del file["t0_fields/pressure"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 1, *GRID))
        properties.set_filter(60000, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((1, T, *GRID))
        h5py.h5d.create(file["t0_fields"].id, b"pressure", h5py.h5t.IEEE_F32LE, space, properties)


def flip_in_chunk(path: Path, snapshot: int, **options: object) -> None:
    replaced(path, "t0_fields/pressure", simulation().pressure_TXYZ[None], chunks=(1, 1, *GRID), **options)
    with h5py.File(path, "r") as file:
        chunk = file["t0_fields/pressure"].id.get_chunk_info(snapshot)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 40] ^= 0xFF
    path.write_bytes(content)


def damage_checksum(path: Path) -> None:
    flip_in_chunk(path, 1, fletcher32=True)


def damage_chunk_size(path: Path) -> None:
    """A chunk is shorter than HDF5 assumes, so that HDF5 would read beyond its memory."""
    flip_in_chunk(path, 1, fletcher32=True)
    size = (4 * 8 * 16 * 8 + 4).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(size) >= T
    path.write_bytes(content.replace(size, bytes(4)))


def damage_compressed(path: Path) -> None:
    flip_in_chunk(path, 1, compression="gzip")


def damage_last_chunk(path: Path) -> None:
    flip_in_chunk(path, 2, compression="gzip", fletcher32=True)


def damage_root_object(path: Path) -> None:
    """The address of the root group lies beyond the end of the file."""
    content = bytearray(path.read_bytes())
    content[64:72] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_swapped, r"pressure of snapshot 0 has values (up to|that are not finite)"),
        (damage_text_field, "t0_fields/pressure holds object, expected float32 or float64"),
        (damage_integers, "t1_fields/velocity holds int32, expected float32"),
        (damage_complex, "t1_fields/velocity holds complex64, expected float32"),
        (damage_no_cells, "holds no data"),
        (damage_external_link, "t1_fields is an external link to other.bin: expected the data itself"),
        (damage_soft_link, "t1_fields/velocity is a soft link to /elsewhere"),
        (damage_external_values, "dataset t0_fields/pressure has its values in another file, values.bin"),
        (damage_virtual, "dataset t0_fields/pressure is virtual"),
        (damage_cycle, "group t0_fields/again is linked from two places"),
        (damage_long_attribute, "attribute long of group notes takes 8388608 bytes: expected at most 65536"),
        (damage_long_text, "attribute note of group t1_fields takes 1048576 bytes: expected at most 65536"),
        (damage_many_attributes, r"group t1_fields has 11\d\d attributes: expected at most 1024"),
        (
            damage_other_grid,
            r"velocity and pressure have grid \[8, 16, 8\], but dimensions/x, y, z have \[8, 32, 8\]",
        ),
        (damage_negative_spacing, "dimensions/x has spacing -1 after value 0, expected a positive one"),
        (damage_zero_spacing, "dimensions/z has spacing 0 after value 0, expected a positive one"),
        (damage_uneven_spacing, "dimensions/z has spacing .* on average: expected a constant spacing"),
        (damage_time_back, "dimensions/time has time step -1 after value 1, expected a positive one"),
        (damage_time_uneven, "dimensions/time has time step .* expected a constant time step"),
        (damage_time_length, r"dimensions/time has shape \(4,\), expected \(3,\) or \(1, 3\)"),
        (damage_claimed_size, "dataset t0_fields/pressure claims shape"),
        (damage_unwritten, "t0_fields/pressure has 1 of 3 chunks: the others were never written"),
        (damage_filter, "t0_fields/pressure is compressed with filter 60000"),
        (
            damage_checksum,
            r"t0_fields/pressure of snapshot 1 cannot be read, wrong checksum in a chunk of \(1, 1, 8, 16, 8\)",
        ),
        (damage_chunk_size, r"t0_fields/pressure: the chunk at \(0, 0, 0, 0, 0\) has 0 bytes, expected 4100"),
        (damage_compressed, "t0_fields/pressure of snapshot 1 cannot be read, wrong compressed data in a chunk"),
        (damage_last_chunk, "the last value of t0_fields/pressure cannot be read, wrong checksum or compressed data"),
        (damage_root_object, "is damaged or unreadable"),
        (damage_missing, "does not exist"),
        (damage_empty, "is empty"),
        (damage_truncated, "is truncated"),
        (damage_text, "is not an HDF5 file"),
        (damage_no_velocity, "has no t1_fields/velocity"),
        (damage_pressure_shape, "do not fit together"),
        (damage_flat_velocity, "has 4 axes"),
        (damage_solid_shape, "solid has shape"),
        (damage_2d, "2 spatial dimensions"),
        (damage_nan, "velocity of snapshot 1 has values that are not finite"),
        (damage_inf, "pressure of snapshot 2 has values that are not finite"),
        (damage_solid_nan, "solid has values that are not finite"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = written(tmp_path)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        read_trajectory(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_both_byte_orders_are_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    replaced(path, "t0_fields/pressure", simulation().pressure_TXYZ[None].astype(">f4"))
    np.testing.assert_array_equal(read_trajectory(path).pressure_T1XYZ[:, 0], simulation().pressure_TXYZ)


def test_a_file_that_is_being_written_is_locked(tmp_path: Path) -> None:
    path = written(tmp_path)
    with h5py.File(path, "r+"), pytest.raises(UserError, match="is locked: another process is writing it"):
        open_trajectories(path)
    assert open_trajectories(path)


def test_spacing_interval_and_units(tmp_path: Path) -> None:
    path = written(tmp_path)
    replaced(path, "dimensions/x", 1e3 + 0.25 * np.arange(8, dtype=np.float32))  # rounded, yet uniform
    replaced(path, "dimensions/time", np.float32([[0, 0.5, 1]]))
    (record,) = open_trajectories(path)
    assert record.spacing == (0.25, 1.0, 1.0)
    assert record.interval == 0.5
    assert record.units.startswith("lattice units")
    with h5py.File(path, "r+") as file:
        del file["dimensions"], file["provenance"]
    (record,) = open_trajectories(path)
    assert (record.spacing, record.interval, record.units) == (None, None, "")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        open_trajectories(tmp_path)


def test_wrong_and_mixed_grids_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=r"grid \[8, 16, 8\], not \[32, 32, 32\]"):
        open_trajectories(path, (32, 32, 32))
    other = simulation(1, (8, 8, 8))
    write_trajectory(path.with_name("z.hdf5"), other, dataset_name="test", domain="d", provenance={})
    with pytest.raises(UserError, match=r"z\.hdf5 has grid"):
        list_trajectories(tmp_path, "train")


def test_empty_and_unknown_splits_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(UserError, match=r"no HDF5 files in .*valid"):
        list_trajectories(tmp_path, "valid")
    with pytest.raises(UserError, match="no split named 'dev'"):
        list_trajectories(tmp_path, "dev")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left"):
        written(tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
