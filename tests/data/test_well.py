"""Prediction files: what they copy from the file they continue, and what they leave out."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh_moe.data import open_trajectories, read_provenance, read_trajectory
from shodh_moe.data.prediction_file import new_prediction

T, GRID = 3, (2, 3, 4)
FLAGS = {"sample_varying": np.False_, "time_varying": np.False_}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two trajectories with everything the schema allows, unusual axis names, and foreign attributes."""
    path = tmp_path / "given.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs.update(dataset_name="theirs", grid_type="cartesian", n_spatial_dims=3, n_trajectories=2, Re=5.0)
        file.attrs["simulation_parameters"] = ["Re", "angle", "drive"]
        file["t1_fields/velocity"] = np.zeros((2, T, *GRID, 3), dtype=np.float32)
        file["t0_fields/pressure"] = np.zeros((2, T, *GRID), dtype=np.float32)
        file["t0_fields/solid"] = np.stack([np.zeros(GRID), np.ones(GRID)])
        file["dimensions/time"] = np.arange(T)
        file["dimensions"].attrs["spatial_dims"] = ["u", "v", "w"]
        for axis, size in zip("uvw", GRID, strict=True):
            file[f"dimensions/{axis}"] = np.arange(size) / 2
        for name, values, varying in (
            ("Re", 5.0, ()),
            ("angle", [1.0, 2.0], ("sample_varying",)),
            ("drive", [1.0, 2.0, 3.0], ("time_varying",)),
        ):
            file[f"scalars/{name}"] = values
            file[f"scalars/{name}"].attrs.update({**FLAGS, **dict.fromkeys(varying, np.True_)})
        file["scalars"].attrs["field_names"] = ["Re", "angle", "drive"]
        for name, sample_varying in (("wall", np.True_), ("wrap", np.False_)):
            group = file.create_group(f"boundary_conditions/{name}")
            group.attrs.update({**FLAGS, "sample_varying": sample_varying}, bc_type="WALL", associated_dims=["u"])
            group["mask"] = np.array([[True, False], [False, True]]) if sample_varying else np.array([True, True])
        file["t0_fields/pressure"].attrs["reference"] = file["dimensions/u"].ref
        file.attrs["references"] = np.array([file["dimensions/u"].ref], dtype=h5py.ref_dtype)
    return path


def test_metadata_is_copied_for_one_trajectory(source: Path, tmp_path: Path) -> None:
    records, time = open_trajectories(source)[1:], np.array([3, 4], dtype=np.float32)
    with new_prediction(tmp_path / "out.hdf5", records, time, "float32", {"steps": 2, "list": [1]}) as file:
        file["t1_fields/velocity"][0, 1] = 7
        file["t0_fields/pressure"][:] = 0
    expected = {"label": "prediction", "units": "those of the input", "steps": 2, "list": [1], "complete": True}
    assert read_provenance(tmp_path / "out.hdf5") == expected
    got = read_trajectory(tmp_path / "out.hdf5", GRID)
    assert got.record.domain == "theirs"
    assert got.velocity_T3XYZ.reshape(2, -1).tolist() == [[0.0] * 72, [7.0] * 72]
    assert got.solid_1XYZ.all()
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert "references" not in file.attrs
        assert (file.attrs["n_trajectories"], file.attrs["Re"]) == (1, 5.0)
        # A drive that varies over the input's times does not apply to the predicted times.
        assert list(file["scalars"]) == ["Re", "angle"]
        assert (
            list(file.attrs["simulation_parameters"]) == list(file["scalars"].attrs["field_names"]) == ["Re", "angle"]
        )
        assert file["scalars/Re"][()] == 5.0
        assert file["scalars/angle"][:].tolist() == [2.0]
        assert file["boundary_conditions/wall/mask"][:].tolist() == [[False, True]]
        assert file["boundary_conditions/wrap/mask"][:].tolist() == [True, True]
        assert list(file["boundary_conditions/wall"].attrs["associated_dims"]) == ["u"]
        assert list(file["dimensions"].attrs["spatial_dims"]) == ["u", "v", "w"]
        assert file["dimensions/w"][:].tolist() == [0.0, 0.5, 1.0, 1.5]
        assert file["dimensions/time"][:].tolist() == [3.0, 4.0]
        for name in ("t0_fields/pressure", "t1_fields/velocity"):
            assert file[name].attrs["time_varying"]
            assert file[name].attrs["sample_varying"]
            assert file[name].attrs["dim_varying"].tolist() == [True] * 3
        assert not file["t0_fields/solid"].attrs["time_varying"]
        assert list(file["t2_fields"].attrs["field_names"]) == []


def test_a_file_of_bare_fields_gets_the_metadata_that_the_schema_requires(tmp_path: Path) -> None:
    path = tmp_path / "bare.hdf5"
    with h5py.File(path, "w") as file:
        file["t1_fields/velocity"] = np.zeros((1, T, *GRID, 3))
        file["t0_fields/pressure"] = np.zeros((1, T, *GRID))
    records, time = open_trajectories(path), np.array([[5.0]], dtype=np.float32)
    with new_prediction(tmp_path / "out.hdf5", records, time, "float64", {}) as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure"):
            file[name][:] = 0
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert list(file["t0_fields"].attrs["field_names"]) == ["pressure"]
        assert file["t0_fields/pressure"].dtype == np.float64
        assert file["dimensions/z"][:].tolist() == [0.5, 1.5, 2.5, 3.5]
        assert file["dimensions/time"].shape == (1, 1)
        assert file["dimensions/time"].attrs["sample_varying"]
        assert file.attrs["grid_type"] == "cartesian"
        assert {"scalars", "boundary_conditions", "t2_fields"} <= set(file)
    assert [r.n_snapshots for r in open_trajectories(tmp_path / "out.hdf5", GRID)] == [1]


def test_a_failure_leaves_no_file(source: Path, tmp_path: Path) -> None:
    time = np.zeros(1, dtype=np.float32)
    with pytest.raises(KeyError), new_prediction(tmp_path / "o.hdf5", open_trajectories(source), time, "float32", {}):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["given.hdf5"]
