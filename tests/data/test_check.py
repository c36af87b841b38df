"""`shodh data check` finds every kind of mistake, reports all of them at once, and accepts sound data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from shodh_moe.cli import main
from shodh_moe.data import compute_stats, list_trajectories, open_trajectories, read_trajectory, write_stats
from shodh_moe.data.check import DIVERGENCE, check_files
from shodh_moe.data.derivatives import relative_divergence
from tests.tiny import tree, write_dataset

FIRST = "data/train/calm.hdf5"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound dataset: curls of random fields, at rest in solids."""
    folder = write_dataset(tmp_path_factory.mktemp("audit"), snapshots=4)
    for path in folder.rglob("*.hdf5"):
        with h5py.File(path, "a") as file:
            velocity = file["t1_fields/velocity"]
            potential = velocity[()]
            curl = [
                np.gradient(potential[..., (i + 2) % 3], axis=2 + (i + 1) % 3)
                - np.gradient(potential[..., (i + 1) % 3], axis=2 + (i + 2) % 3)
                for i in range(3)
            ]
            file["t0_fields/solid"][...] = 0
            file["t0_fields/solid"][:, :2] = 1
            velocity[...] = np.stack(curl, -1)
            velocity[:, :, :2] = 0
    write_stats(folder, compute_stats(read_trajectory(record) for record in list_trajectories(folder, "train")))
    return folder


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "theirs"))


def change(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value


def test_sound_data_have_no_findings_and_are_not_changed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(dataset)
    report = check_files(dataset)
    assert [finding.line() for finding in report.findings] == []
    assert [one["file"] for one in report.trajectories][:2] == [FIRST, "data/train/wild.hdf5"]
    assert all(0 < one["divergence"] < DIVERGENCE for one in report.trajectories)
    assert main(["data", "check", str(dataset)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{FIRST}: rms of the divergence is 0.")
    assert lines[-1] == "6 trajectories, 0 errors, 0 warnings"
    assert tree(dataset) == before
    assert main(["data", "check", str(dataset / FIRST), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trajectories"][0]["file"] == "calm.hdf5"


def nan(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["t0_fields/pressure"][0, 2, 0, 0, 0] = np.nan


def uneven_time(path: Path) -> None:
    change(path, "dimensions/time", np.array([0, 1, 2, 4], dtype=np.float32))


def uneven_axis(path: Path) -> None:
    change(path, "dimensions/y", np.arange(16, dtype=np.float32) ** 1.5)


def negative_axis(path: Path) -> None:
    change(path, "dimensions/y", -np.arange(16, dtype=np.float32))


def flat_cells(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["dimensions/y"][...] *= 2


def fast_solids(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["t1_fields/velocity"][0, 1, 0, 3, 3] = 0.5


def diverging(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["t1_fields/velocity"][...] = np.roll(file["t1_fields/velocity"][()], 1, -1)


def no_provenance(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["provenance"]


def no_units(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["provenance"].attrs["units"]


def foreign_schema(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["t2_fields"]
        del file["t0_fields/pressure"].attrs["dim_varying"]
        file["boundary_conditions/x_periodic"].attrs["bc_type"] = "MOVING"


def double(path: Path) -> None:
    with h5py.File(path, "a") as file:
        values, attributes = file["t0_fields/pressure"][()], dict(file["t0_fields/pressure"].attrs)
        del file["t0_fields/pressure"]
        file["t0_fields/pressure"] = values.astype(np.float64)
        file["t0_fields/pressure"].attrs.update(attributes)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def repeated_frames(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure"):
            file[name][0, 2:] = file[name][0, 1:2]


def both_ends(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["t0_fields/solid"][...] = 0
        file["t1_fields/velocity"][:, :, :, -1] = file["t1_fields/velocity"][:, :, :, 0]


def small(path: Path) -> None:
    write_dataset(path.parent / "x", grid=(8, 8, 8), snapshots=4)
    shutil.copy(path.parent / "x/data/train/wild.hdf5", path)
    shutil.rmtree(path.parent / "x")


@pytest.mark.parametrize(
    ("damage", "severity", "messages"),
    [
        (nan, "error", ("pressure of snapshot 2", "not finite")),
        (uneven_time, "error", ("dimensions/time", "time step 2 after value 2", "constant time step")),
        (uneven_axis, "error", ("dimensions/y", "constant spacing")),
        (negative_axis, "error", ("dimensions/y", "-1", "positive")),
        (flat_cells, "error", ("cells of 1 x 2 x 1", "cubes")),
        (fast_solids, "warning", ("t1_fields/velocity", "in solid voxels", "expected 0")),
        (diverging, "warning", ("t1_fields/velocity", "rms of the divergence is 0.", "above 0.2")),
        (no_provenance, "warning", ("provenance", "missing")),
        (no_units, "warning", ("provenance/units", "missing")),
        (foreign_schema, "warning", ("t2_fields: no such group",)),
        (foreign_schema, "warning", ("t0_fields/pressure: attribute dim_varying",)),
        (foreign_schema, "warning", ("bc_type is MOVING", "WALL, OPEN, PERIODIC")),
        (double, "warning", ("t0_fields/pressure: holds float64, expected float32",)),
        (truncate, "error", ("truncated",)),
        (repeated_frames, "warning", ("2 snapshots are the same as an earlier one", "snapshot 2 as 1")),
        (both_ends, "error", ("the last plane along y repeats the first", "repeated_end: [y]")),
        (small, "error", ("grid [8, 8, 8], expected [16, 16, 16] as in data/train/calm.hdf5",)),
    ],
)
def test_each_kind_of_damage_is_found(
    dataset: Path, damage: Callable[[Path], None], severity: str, messages: tuple[str, ...]
) -> None:
    damage(dataset / "data/valid/wild.hdf5")
    lines = [finding.line() for finding in check_files(dataset).findings]
    assert any(
        line.startswith(f"{severity}: data/valid/wild.hdf5: ") and all(w in line for w in messages) for line in lines
    )
    # Sound files have no findings.
    assert not [line for line in lines if "wild" not in line and "data/valid: " not in line]


def test_the_same_trajectory_in_two_splits(dataset: Path) -> None:
    shutil.copy(dataset / FIRST, dataset / "data/test/other_name.hdf5")
    shutil.copy(dataset / "data/valid/wild.hdf5", dataset / "data/valid/again.hdf5")
    found = check_files(dataset).findings
    assert [(one.severity, one.file, one.text.split(":")[0]) for one in found] == [
        ("warning", "data/valid/wild.hdf5", "4 snapshots are also in data/valid/again.hdf5"),
        ("error", "data/test/other_name.hdf5", f"4 snapshots are also in {FIRST}"),
    ]


def test_stale_statistics_are_named(dataset: Path) -> None:
    stats = yaml.safe_load((dataset / "stats.yaml").read_text())
    correct = stats["rms"]["velocity"][1]
    stats["rms"]["velocity"][1] *= 1.01
    del stats["std_delta"]["pressure"]
    (dataset / "stats.yaml").write_text(yaml.safe_dump(stats))
    found = check_files(dataset).findings
    assert [(one.severity, one.file, one.dataset) for one in found] == [
        ("error", "stats.yaml", "rms.velocity"),
        ("error", "stats.yaml", "std_delta.pressure"),
    ]
    assert f"{correct:.6g}" in found[0].text
    for content, messages in ((None, "missing"), ("a: [", "cannot be read"), ("text", "the training split has")):
        (dataset / "stats.yaml").unlink(missing_ok=True)
        if content:
            (dataset / "stats.yaml").write_text(content)
        assert messages in check_files(dataset).findings[0].text


@pytest.mark.parametrize("solid", [False, True])
def test_statistics_without_solids_are_correct_for_files_without_them(dataset: Path, solid: bool) -> None:
    """The Well's own files and stats.yaml have no solid."""
    for path in dataset.rglob("*.hdf5"):
        with h5py.File(path, "a") as file:
            if not solid:
                del file["t0_fields/solid"]
            file["t0_fields"].attrs["field_names"] = list(file["t0_fields"])
    stats = compute_stats(read_trajectory(record) for record in list_trajectories(dataset, "train"))
    for numbers in stats.values():
        numbers.pop("solid", None)
    write_stats(dataset, stats)
    errors = [finding.dataset for finding in check_files(dataset).findings if finding.severity == "error"]
    assert errors == ([f"{key}.solid" for key in ("mean", "std", "rms")] if solid else [])


def test_missing_splits_and_unmatched_domains(dataset: Path) -> None:
    with h5py.File(dataset / "data/valid/wild.hdf5", "a") as file:
        file.attrs["domain"] = "third"
    shutil.rmtree(dataset / "data/test")
    (line,) = [finding.line() for finding in check_files(dataset).findings]
    assert line == "error: data/test: no usable trajectory: training needs every split"
    shutil.copytree(dataset / "data/train", dataset / "data/test")
    lines = [finding.line() for finding in check_files(dataset).findings]
    assert any("has the domains calm, third" in line for line in lines)


def test_all_findings_are_reported_at_once_and_skip_bad_changes_the_exit_code(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(dataset / "data/test/calm.hdf5")
    shutil.copy(dataset / "data/test/wild.hdf5", dataset / "data/test/third.hdf5")
    fast_solids(dataset / "data/valid/calm.hdf5")
    assert main(["data", "check", str(dataset), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    files = {(one["severity"], one["file"]) for one in found["findings"]}
    assert ("error", "data/test/calm.hdf5") in files
    assert ("warning", "data/valid/calm.hdf5") in files
    assert ("warning", "data/test/wild.hdf5") in files
    with h5py.File(dataset / "data/test/third.hdf5", "a") as file:
        file.attrs["domain"] = "calm"
    assert main(["data", "check", str(dataset), "--skip-bad"]) == 0
    assert "warning: data/test/calm.hdf5: " in capsys.readouterr().out


def test_a_folder_without_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "no HDF5 files" in capsys.readouterr().err


def test_divergence_excludes_solids_and_open_ends(dataset: Path) -> None:
    record = open_trajectories(dataset / FIRST)[0]
    x = np.arange(16.0)[:, None, None] * np.ones((16, 16, 16))
    zero, fluid = np.zeros_like(x), np.zeros((16, 16, 16), dtype=bool)
    walls = record.__class__(record.path, 0, "d", 1, (16, 16, 16), (False, True, True))
    # The only slope is du/dx, so the whole gradient is divergence; a shear dv/dx has none.
    assert relative_divergence(np.stack([x, zero, zero]), fluid, walls) == pytest.approx(1)
    assert relative_divergence(np.stack([zero, x, zero]), fluid, walls) == 0
    solid = fluid.copy()
    solid[8] = True
    jump = np.where(solid, 0, 1.0)
    assert relative_divergence(np.stack([jump, x, zero]), solid, walls) == 0
