"""Reading: other people's files, every kind of bad file, and the torch dataset."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.data import (
    SnapshotDataset,
    domain_names,
    list_trajectories,
    open_trajectories,
    read_provenance,
    read_snapshots,
    read_trajectory,
    write_trajectory,
)
from shodh_moe.errors import UserError
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
def test_what_is_written_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, grid: tuple[int, int, int]
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "a.hdf5"
    wanted = simulation(seed, grid)
    write_trajectory(path, wanted, dataset_name="test", domain="d", provenance={})
    got = read_trajectory(path, grid)
    np.testing.assert_array_equal(got.velocity_T3XYZ, wanted.velocity_T3XYZ)
    np.testing.assert_array_equal(got.pressure_T1XYZ[:, 0], wanted.pressure_TXYZ)
    np.testing.assert_array_equal(got.solid_1XYZ[0], wanted.solid_XYZ)
    assert got.velocity_T3XYZ.dtype == got.pressure_T1XYZ.dtype == got.solid_1XYZ.dtype == np.float32


def test_index_of_a_folder(tmp_path: Path) -> None:
    for domain in ("porous_media", "open_channel"):
        for index in range(2):
            written(tmp_path, domain, index)
    (tmp_path / "data/train/.half.hdf5").write_bytes(b"")
    records = list_trajectories(tmp_path, "train", GRID)
    assert [(r.domain, r.n_snapshots, r.grid) for r in records] == [("open_channel", T, GRID)] * 2 + [
        ("porous_media", T, GRID)
    ] * 2
    assert domain_names(records) == ["open_channel", "porous_media"]


@pytest.mark.parametrize("budget", [2**30, 0])
def test_snapshot_dataset(tmp_path: Path, budget: int) -> None:
    written(tmp_path, "open_channel", 0)
    written(tmp_path, "porous_media", 1)
    data = SnapshotDataset(list_trajectories(tmp_path, "train"), ram_budget_bytes=budget)
    assert len(data) == 2 * T
    assert data.in_memory == bool(budget)
    fields, domain = data[T + 1]
    wanted = simulation(1)
    assert domain == 1
    assert fields.dtype == torch.float32
    assert fields.shape == (5, *GRID)
    np.testing.assert_array_equal(fields[:3], wanted.velocity_T3XYZ[1])
    np.testing.assert_array_equal(fields[3], wanted.pressure_TXYZ[1])
    np.testing.assert_array_equal(fields[4], wanted.solid_XYZ)
    with pytest.raises(UserError, match="porous_media"):
        SnapshotDataset(data.records, domains=["open_channel"])


def test_part_of_a_trajectory(tmp_path: Path) -> None:
    (record,) = open_trajectories(written(tmp_path))
    fields, solid = read_snapshots(record, 1, 3)
    np.testing.assert_array_equal(fields[:, :3], simulation().velocity_T3XYZ[1:3])
    assert solid.shape == (1, *GRID)


def test_files_of_others(tmp_path: Path) -> None:
    """Several trajectories in a file, float64, no solid and none of our attributes."""
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
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


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        open_trajectories(tmp_path)


def test_wrong_grid_and_mixed_grids(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=r"grid \[8, 16, 8\], not \[32, 32, 32\]"):
        open_trajectories(path, (32, 32, 32))
    other = simulation(1, (8, 8, 8))
    write_trajectory(path.with_name("z.hdf5"), other, dataset_name="test", domain="d", provenance={})
    with pytest.raises(UserError, match=r"z\.hdf5 has grid"):
        list_trajectories(tmp_path, "train")


def test_empty_or_unknown_split(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(UserError, match=r"no HDF5 files in .*valid"):
        list_trajectories(tmp_path, "valid")
    with pytest.raises(UserError, match="no split named 'dev'"):
        list_trajectories(tmp_path, "dev")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left"):
        written(tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
