"""`shodh data info`: the numbers in the table match the files."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh_moe.cli import main
from shodh_moe.data import list_trajectories, read_trajectory
from shodh_moe.data.info import describe
from tests.tiny import refused, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("info"), snapshots=5)


def test_the_summary_matches_the_files(dataset: Path) -> None:
    found = describe(dataset)
    assert (found["trajectories"], found["snapshots"], found["statistics"]) == (6, 30, True)
    assert found["bytes"] == sum(path.stat().st_size for path in dataset.rglob("*.hdf5"))
    assert [(one["split"], one["domain"]) for one in found["entries"]][:3] == [
        ("train", "calm"),
        ("train", "wild"),
        ("valid", "calm"),
    ]
    first = found["entries"][0]
    assert (first["grids"], first["time_step"], first["spacing"]) == ([(16, 16, 16)], 1, (1, 1, 1))
    trajectory = read_trajectory(list_trajectories(dataset, "train")[0])
    fluid = trajectory.solid_1XYZ[0] == 0
    speed = np.linalg.norm(trajectory.velocity_T3XYZ, axis=1)[:, fluid]
    assert first["ranges"]["speed"]["max"] == pytest.approx(speed.max())
    assert first["ranges"]["speed"]["rms"] == pytest.approx(np.sqrt(np.mean(speed**2)))
    assert first["ranges"]["pressure"]["min"] == pytest.approx(trajectory.pressure_T1XYZ[:, 0, fluid].min())
    assert first["ranges"]["solid"]["mean"] == pytest.approx(1 - fluid.mean())
    assert first["scalars"]["viscosity"] == [pytest.approx(0.1)] * 2


def test_the_command_prints_a_table_or_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(dataset)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].startswith(f"{dataset}: 6 trajectories, 30 snapshots, ")
    for words in ("16 x 16 x 16", "reynolds 1", "synthetic", "lattice units", "periodic    x, y, z", "float32"):
        assert words in output
    assert main(["data", "info", str(dataset / "data/test/wild.hdf5"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["domain"] for one in found["entries"]] == ["wild"]
    assert found["statistics"] is None


def test_foreign_and_damaged_files(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "data/train"
    bare.mkdir(parents=True)
    with h5py.File(bare / "bare.hdf5", "w") as file:
        file.create_dataset("t1_fields/velocity", data=np.ones((2, 3, 8, 8, 8, 3)), compression="gzip")
        file["t0_fields/pressure"] = np.ones((2, 3, 8, 8, 8))
    (bare / "bad.hdf5").write_bytes(b"x")
    assert main(["data", "info", str(tmp_path)]) == 2
    output = capfd.readouterr().out
    for words in ("2 trajectories, 6 snapshots", "no stats.yaml", "gzip", "not stated", "bad.hdf5 is not an HDF5 file"):
        assert words in output
    (bare / "bare.hdf5").unlink()
    refused(capfd, "data", "info", str(tmp_path), says=("bad.hdf5 is not an HDF5 file",))
