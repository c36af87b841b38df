"""Datasets at a URL: the same values as in the local files, and no more bytes than are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote_file import BLOCK, mirror, pointed_at
from shodh_moe.cli import main
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import list_trajectories, opening, read_snapshots, read_trajectory, write_trajectory
from shodh_moe.data.direct import find_places
from shodh_moe.data.opening import opened
from shodh_moe.solvers import Simulation
from tests.object_server import ObjectServer, fresh_bucket
from tests.tiny import config

T, GRID = 12, (32, 32, 32)
SNAPSHOT = 4 * 4 * 32**3  # bytes of velocity and pressure
FILE = "/bucket/set/data/train/a.hdf5"
URL = "s3://bucket/set"


@pytest.fixture
def server(store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """The server with one dataset in it, which is also in the folder ``set``."""
    monkeypatch.chdir(tmp_path)
    fresh_bucket(store, tmp_path, monkeypatch)
    opening._stop()  # it has the variables of an earlier test
    write(Path("set/data/train/a.hdf5"), 0)
    Path("set/stats.yaml").write_text("a: 1\n")
    put("set")
    store.reset()
    return store


def write(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    simulation = Simulation(
        velocity_T3XYZ=rng.standard_normal((T, 3, *GRID)).astype(np.float32),
        pressure_TXYZ=rng.standard_normal((T, *GRID)).astype(np.float32),
        solid_XYZ=rng.random(GRID) < 0.3,
        lid=False,
        time_T=np.arange(T, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
    )
    write_trajectory(path, simulation, dataset_name="test", domain="open_channel", provenance={"seed": seed})


def put(path: str) -> None:
    # A slash at both ends keeps a folder that exists from being put into itself.
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{path}/", f"bucket/{path}/", recursive=True)


def test_a_remote_dataset_has_the_values_of_the_local_one(server: ObjectServer) -> None:
    folder = mirror(URL)
    assert (folder / "stats.yaml").read_text() == "a: 1\n"
    [there], [here] = list_trajectories(folder, "train"), list_trajectories("set", "train")
    assert (there.n_snapshots, there.grid, there.domain) == (here.n_snapshots, here.grid, here.domain)
    ours, theirs = read_trajectory(there), read_trajectory(here)
    np.testing.assert_array_equal(ours.velocity_T3XYZ, theirs.velocity_T3XYZ)
    np.testing.assert_array_equal(ours.pressure_T1XYZ, theirs.pressure_T1XYZ)
    np.testing.assert_array_equal(ours.solid_1XYZ, theirs.solid_1XYZ)
    # All that is read without HDF5 finds no data in a pointer.
    assert find_places(here) is not None
    assert find_places(there) is None
    assert (folder / "data/train/a.hdf5").stat().st_size < 1000


def test_only_what_is_read_is_transferred_and_only_once(server: ObjectServer) -> None:
    size = Path("set/data/train/a.hdf5").stat().st_size
    assert size > T * SNAPSHOT
    [record] = list_trajectories(mirror(URL), "train")
    described = server.sent[FILE]
    assert described <= 6 * BLOCK
    fields, solid = read_snapshots(record, 1, 2)
    read = server.sent[FILE]
    # Each of the three arrays may begin and end within a block.
    assert read - described <= SNAPSHOT + solid.nbytes + 6 * BLOCK
    assert read < size / 4
    again, _ = read_snapshots(record, 1, 2)
    np.testing.assert_array_equal(again, fields)
    assert server.sent[FILE] == read
    read_snapshots(record)
    assert server.sent[FILE] <= size
    # A cache of which a part was removed is never taken for data.
    for file in (Path(os.environ["SHODH_CACHE"]) / "blocks").iterdir():
        if not file.suffix:
            file.unlink()
    np.testing.assert_array_equal(read_snapshots(record, 1, 2)[0], fields)
    assert server.sent[FILE] > size
    shutil.rmtree(Path(os.environ["SHODH_CACHE"]) / "blocks")
    np.testing.assert_array_equal(read_snapshots(record, 1, 2)[0], fields)


def test_a_broken_transfer_is_no_damage(server: ObjectServer) -> None:
    [record] = list_trajectories(mirror(URL), "train")
    server.fail_after = 0
    with pytest.raises(UserError, match=r"the transfer of s3://bucket/set/data/train/a.hdf5 broke"):
        read_snapshots(record)
    server.fail_after = None
    np.testing.assert_array_equal(read_snapshots(record)[0], read_snapshots(list_trajectories("set", "train")[0])[0])
    # The process that inspects files reads by the same way.
    os.utime(record.path)
    shutil.rmtree(Path(os.environ["SHODH_CACHE"]) / "blocks")
    server.fail_after = 0
    with pytest.raises(UserError, match=r"the transfer of s3://bucket/set/data/train/a.hdf5 broke"):
        list_trajectories(mirror(URL), "train")


def test_changed_files_are_noticed(server: ObjectServer) -> None:
    folder = mirror(URL)
    before = pointed_at(folder / "data/train/a.hdf5")
    write(Path("set/data/train/a.hdf5"), 1)
    write(Path("set/data/train/b.hdf5"), 2)
    put("set")
    with (
        pytest.raises(UserError, match="has changed since its folder was listed"),
        opened(folder / "data/train/a.hdf5"),
    ):
        pass
    assert mirror(URL) == folder
    assert pointed_at(folder / "data/train/a.hdf5") != before
    assert len(list_trajectories(folder, "train")) == 2
    fsspec.filesystem("s3", skip_instance_cache=True).rm("bucket/set/data/train/b.hdf5")
    assert len(list_trajectories(mirror(URL), "train")) == 1
    with pytest.raises(UserError, match=r"s3://bucket/none does not exist"):
        mirror("s3://bucket/none")


def test_a_config_may_name_a_url(server: ObjectServer) -> None:
    made = config(data={"path": URL, "grid": list(GRID)})
    paths = resolve_paths(made)
    assert [record.path.name for record in list_trajectories(paths.dataset, "train")] == ["a.hdf5"]
    assert resolve_paths(made) == paths
    assert server.sent[FILE] < Path("set/data/train/a.hdf5").stat().st_size / 4
    write(Path("set/data/train/a.hdf5"), 1)
    put("set")
    assert resolve_paths(made).data_id != paths.data_id


def test_the_commands_that_inspect_datasets_take_a_url(
    server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for place in ("set", URL):
        assert main(["data", "info", "--json", place]) == 0
        found.append({key: value for key, value in json.loads(capsys.readouterr().out).items() if key != "path"})
    assert found[0] == found[1]
    assert str(Path("set/data/train/a.hdf5").stat().st_size) in json.dumps(found[1])
    assert main(["data", "preview", URL, "--output", "pictures"]) == 0
    assert list(Path("pictures").iterdir())
    assert server.sent[FILE] <= Path("set/data/train/a.hdf5").stat().st_size  # nothing was transferred twice


def test_data_check_of_a_url_finds_what_it_finds_in_the_folder(
    server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for place in ("set", URL):
        assert main(["data", "check", "--json", place]) == 2
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    assert len(reports[1]["trajectories"]) == 1
    assert any(one["file"] == "stats.yaml" and one["severity"] == "error" for one in reports[1]["findings"])
    assert main(["data", "check", "s3://bucket/none"]) == 2
    assert "s3://bucket/none does not exist" in capsys.readouterr().err
