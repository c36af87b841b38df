"""Written values are read back unchanged: compressed files and their checksums, and a passive scalar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.config import DataConfig
from shodh_moe.data import compute_stats, list_trajectories, read_trajectory, write_stats, write_trajectory
from shodh_moe.data.generation import generate
from shodh_moe.data.planned import unfinished
from shodh_moe.data.stats import read_concentration
from shodh_moe.data.storage import layout
from shodh_moe.solvers import Simulation

GRID, T = (8, 16, 8), 3


def simulation(scalar: bool = False) -> Simulation:
    rng = np.random.default_rng(0)
    return Simulation(
        velocity_T3XYZ=rng.standard_normal((T, 3, *GRID), dtype=np.float32),
        pressure_TXYZ=rng.standard_normal((T, *GRID), dtype=np.float32),
        solid_XYZ=rng.random(GRID) > 0.6,
        lid=True,
        time_T=np.arange(T, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
        scalar_TXYZ=rng.random((T, *GRID), dtype=np.float32) if scalar else None,
    )


def write(path: Path, made: Simulation, compression: str | None = None) -> Path:
    write_trajectory(path, made, dataset_name="d", domain="d", provenance={}, compression=compression)
    return path


@pytest.mark.parametrize("compression", [None, "lzf", "gzip"])
def test_values_do_not_depend_on_the_compression(tmp_path: Path, compression: str | None) -> None:
    made = simulation(scalar=True)
    path = write(tmp_path / "d.hdf5", made, compression)
    got = read_trajectory(path)
    np.testing.assert_array_equal(got.velocity_T3XYZ, made.velocity_T3XYZ)
    np.testing.assert_array_equal(got.pressure_T1XYZ[:, 0], made.pressure_TXYZ)
    np.testing.assert_array_equal(got.solid_1XYZ[0], made.solid_XYZ)
    concentration = read_concentration(got.record)
    assert concentration is not None
    np.testing.assert_array_equal(concentration[:, 0], made.scalar_TXYZ)
    with h5py.File(path) as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure", "t0_fields/concentration", "t0_fields/solid"):
            assert file[name].compression == compression
            assert file[name].fletcher32 == bool(compression)
        assert file["t1_fields/velocity"].chunks == (None if compression is None else (1, 1, *GRID, 3))


def test_large_snapshots_are_stored_in_slabs() -> None:
    assert layout((1, 50, 128, 128, 128, 3), 2, "lzf")["chunks"] == (1, 1, 22, 128, 128, 3)
    assert layout((1, 50, 128, 128, 128), 2, "lzf")["chunks"] == (1, 1, 64, 128, 128)
    assert layout((1, 4, 2048, 2048), 1, "gzip")["chunks"] == (1, 1, 2048, 2048)
    assert layout((1, 50, 128, 128, 128), 2) == {}


def test_a_flipped_bit_of_a_compressed_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.hdf5", simulation(), "lzf")
    with h5py.File(path) as file:
        chunk = file["t1_fields/velocity"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.hdf5.*velocity"):
        read_trajectory(path)


def test_a_scalar_follows_the_schema(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path / "d.hdf5", simulation(scalar=True))) as file:
        assert list(file["t0_fields"].attrs["field_names"]) == ["pressure", "concentration", "solid"]
        field = file["t0_fields/concentration"]
        assert (field.shape, field.dtype) == ((1, T, *GRID), np.float32)
        assert field.attrs["time_varying"]
        assert field.attrs["sample_varying"]
        assert field.attrs["dim_varying"].tolist() == [True] * 3
        for boundary in file["boundary_conditions"].values():
            assert list(boundary.attrs["associated_fields"]) == ["velocity", "pressure", "concentration"]


def test_no_file_is_written_for_a_scalar_that_is_not_finite(tmp_path: Path) -> None:
    made = simulation(scalar=True)
    assert made.scalar_TXYZ is not None
    made.scalar_TXYZ[1, 2, 3, 4] = np.inf
    with pytest.raises(UserError, match="concentration of snapshot 1 has values that are not finite"):
        write(tmp_path / "d.hdf5", made)
    assert not list(tmp_path.iterdir())


def test_statistics_include_the_scalar_only_if_every_file_has_it(tmp_path: Path) -> None:
    made = simulation(scalar=True)
    folder = tmp_path / "data" / "train"
    write(folder / "a.hdf5", made)
    stats = compute_stats(read_trajectory(record) for record in list_trajectories(tmp_path, "train"))
    assert made.scalar_TXYZ is not None
    np.testing.assert_allclose(stats["mean"]["concentration"], made.scalar_TXYZ.mean(dtype=np.float64), rtol=1e-12)
    assert "concentration" in stats["rms_delta"]
    write(folder / "b.hdf5", replace(made, scalar_TXYZ=None))
    stats = compute_stats(read_trajectory(record) for record in list_trajectories(tmp_path, "train"))
    assert all("concentration" not in group for group in stats.values())


FLOW = {"spinup_steps": 2, "steps_per_snapshot": 2, "trajectories": {"train": 1, "valid": 1, "test": 1}}


def config(**domains: object) -> DataConfig:
    return DataConfig.model_validate({"grid": [16, 16, 16], "snapshots": 2, "domains": domains})


def test_mixing_domains_with_and_without_a_scalar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.domains\.porous_media\.scalar is null while"):
        unfinished(config(open_channel={**FLOW, "scalar": {}}, porous_media={**FLOW, "grain": 3.0}), tmp_path)


def test_generation_writes_the_scalar_and_its_statistics(tmp_path: Path) -> None:
    both = config(open_channel={**FLOW, "scalar": {}}, porous_media={**FLOW, "grain": 3.0, "scalar": {}})
    generate(both, tmp_path)
    stats = compute_stats(read_trajectory(record) for record in list_trajectories(tmp_path, "train"))
    assert stats["rms"]["concentration"] > 0
    assert yaml.safe_load((tmp_path / "stats.yaml").read_text()) == stats, "to the last bit"


def test_the_well_reads_compressed_files_with_a_scalar(tmp_path: Path) -> None:
    well = pytest.importorskip("the_well.data")
    normalization = pytest.importorskip("the_well.data.normalization")
    made = simulation(scalar=True)
    write(tmp_path / "data" / "train" / "a.hdf5", made, "lzf")
    stats = compute_stats(read_trajectory(record) for record in list_trajectories(tmp_path, "train"))
    write_stats(tmp_path, stats)
    for normalise in (False, True):
        sample = well.WellDataset(
            path=str(tmp_path),
            well_split_name="train",
            use_normalization=normalise,
            normalization_type=normalization.RMSNormalization,
        )[0]
        assert sample["input_fields"].shape == (1, *GRID, 5)
        assert made.scalar_TXYZ is not None
        scale = stats["rms"]["concentration"] if normalise else 1.0
        np.testing.assert_allclose(sample["input_fields"][0, ..., 1], made.scalar_TXYZ[0] / scale, rtol=1e-6)
