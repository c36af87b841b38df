"""Snapshots are imported in the order of time, whatever the files and datasets are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.data import list_trajectories, read_trajectory
from shodh_moe.data.importing import import_data, load_mapping
from tests.tiny import quiet

GRID = (8, 8, 8)
BASE: dict[str, Any] = {
    "name": "theirs",
    "domain": "box",
    "axes": ["c", "x", "y", "z"],
    "velocity": "u",
    "pressure": "p",
    "spacing": 0.5,
    "time_step": 0.25,
    "boundaries": {"x": "periodic", "y": "periodic", "z": "periodic"},
    "units": {"length": "m", "time": "s"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(value: float) -> dict[str, np.ndarray]:
    """Fields of random numbers around a value, which identifies the snapshot."""
    rng = np.random.default_rng(abs(int(1e6 * value)))
    return {"u": value + 0.1 * rng.random((3, *GRID)), "p": value + 0.1 * rng.random(GRID)}


def order(files: list[Any], **changes: Any) -> list[float]:
    """Import one trajectory, and return the values that identify its snapshots, in the order in which they came."""
    tree = {**BASE, "files": {"train": files}, **changes}
    Path("mapping.yaml").write_text(yaml.safe_dump({key: one for key, one in tree.items() if one is not None}))
    out = import_data(load_mapping("mapping.yaml"), Path("out"), progress=quiet)
    (record,) = list_trajectories(out, "train")
    trajectory = read_trajectory(record)
    found = trajectory.velocity_T3XYZ.min(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(trajectory.pressure_T1XYZ.min(axis=(1, 2, 3, 4)), found, atol=0.05)
    return [round(float(value)) for value in found]


@pytest.mark.parametrize(
    "names",
    [
        ["a-0.0005", "a-0.001", "a-0.0015", "a-0.002"],
        ["9", "10", "11"],
        ["u_-1", "u_-0.5", "u_0", "u_0.5"],
        ["t-1", "t0", "t1"],
        ["part-1", "part-2", "part-10"],
        ["1e-05", "0.0001", "2E-4", "1"],
        ["0.1/u", "0.15/u", "0.2/u", "10/u"],
        ["x.5", "x.10"],
        ["u_.5", "u_.75", "u_1"],
    ],
)
def test_numbers_in_names_are_compared_as_numbers(names: list[str]) -> None:
    for value, name in enumerate(names, 1):
        Path(f"runs/{name}.npz").parent.mkdir(parents=True, exist_ok=True)
        np.savez(f"runs/{name}.npz", **snapshot(value))
    assert order([["runs/**/*.npz"]]) == list(range(1, len(names) + 1))
    with h5py.File("all.h5", "w") as file:
        for value, name in enumerate(names, 1):
            for field, values in snapshot(value).items():
                file[f"{field}/{name}"] = values
    assert order([["all.h5"]], velocity="u/*", pressure="p/*") == list(range(1, len(names) + 1))


def test_a_pattern_with_a_character_class_orders_by_numbers() -> None:
    with h5py.File("all.h5", "w") as file:
        for value in range(12):
            for field, values in snapshot(value + 1).items():
                file[f"{field}_{value}"] = values
    assert order([["all.h5"]], velocity="u_[0-9]*", pressure="p_[0-9]*") == list(range(1, 13))
    assert order([["all.h5"]], velocity="u_?", pressure="p_?") == list(range(1, 11))


def test_an_explicit_list_keeps_its_order() -> None:
    for value, name in enumerate(("start", "b_2", "b_1"), 1):
        np.savez(f"{name}.npz", **snapshot(value))
    assert order([["start.npz", "b_2.npz", "b_1.npz"]]) == [1, 2, 3]
    assert order([["start.npz", "b_*.npz"]]) == [1, 3, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a_1", "a_01"], "a_01.npz and a_1.npz have the same numbers"),
        (["a_0.0005", "a_5e-4"], "a_0.0005.npz and a_5e-4.npz have the same numbers"),
        (["a_1", "a_mean"], "a_1.npz and a_mean.npz differ in more than their numbers"),
        (["a_1.9", "a_1.10"], "1.10 in a_1.10.npz may be a decimal number or two counters"),
        (["a_0p1", "a_0p15", "a_0p2"], "0p1 in a_0p1.npz may be a decimal number or two counters"),
    ],
)
def test_names_without_a_clear_order_are_refused(names: list[str], message: str) -> None:
    for value, name in enumerate(names, 1):
        np.savez(f"{name}.npz", **snapshot(value))
    with pytest.raises(UserError, match=message):
        order([["a_*.npz"]])
    assert order([[f"{name}.npz" for name in names]]) == list(range(1, len(names) + 1))


def write_numbered(path: str, values: list[float], times: list[float] | None = None) -> None:
    """Write the snapshots of a file as u_0001, u_0002, ..., and their times as one dataset."""
    with h5py.File(path, "w") as file:
        for number, value in enumerate(values, 1):
            for field, stored in snapshot(value).items():
                file[f"{field}_{number:04d}"] = stored
        if times:
            file["time"] = times


def test_files_with_the_same_numbered_datasets_are_not_mixed() -> None:
    write_numbered("a.h5", [1, 2, 3])
    write_numbered("b.h5", [4, 5, 6])
    numbered = {"velocity": "u_*", "pressure": "p_*"}
    with pytest.raises(UserError, match=r"a.h5 and b.h5 both hold u_0001.*trajectories of their own"):
        order([["a.h5", "b.h5"]], **numbered)
    with pytest.raises(UserError, match=r"one list names a.h5 twice"):
        order([["a.h5", "?.h5"]], **numbered)
    # Their times tell how they follow each other.
    write_numbered("a.h5", [1, 2, 3], [0.75, 1.0, 1.25])
    write_numbered("b.h5", [4, 5, 6], [0.0, 0.25, 0.5])
    for time in ({}, {"time": "time", "time_step": None}):
        changes = {key: value for key, value in {**numbered, **time}.items() if value is not None}
        base = {**BASE, **changes}
        if time:
            del base["time_step"]
        Path("mapping.yaml").write_text(yaml.safe_dump({**base, "files": {"train": [["a.h5", "b.h5"]]}}))
        out = import_data(load_mapping("mapping.yaml"), Path("out"), progress=quiet)
        found = read_trajectory(list_trajectories(out, "train")[0]).velocity_T3XYZ.min(axis=(1, 2, 3, 4))
        assert np.round(found).tolist() == [4, 5, 6, 1, 2, 3]
    write_numbered("b.h5", [4, 5, 6], [0.75, 1.0, 1.25])
    with pytest.raises(UserError, match=r"u_0001 of a.h5 and u_0001 of b.h5 are both at time 0.75"):
        order([["a.h5", "b.h5"]], **numbered)


@pytest.mark.parametrize("where", ["dataset", "attribute of the array", "attribute of the file"])
def test_the_time_that_a_file_holds_decides(where: str) -> None:
    for name, value in (("first", 1), ("second", 2), ("third", 3)):
        with h5py.File(f"{name}.h5", "w") as file:
            file.update(snapshot(value))
            if where == "dataset":
                file["time"] = 0.25 * value
            for field in "up":
                (file if where == "attribute of the file" else file[field]).attrs["Time"] = 0.25 * value
    assert order([["third.h5", "first.h5", "second.h5"]]) == [1, 2, 3]
    with pytest.raises(UserError, match=r"time_step is 0.5, but the times in the files go in steps of 0.25"):
        order([["first.h5", "second.h5", "third.h5"]], time_step=0.5)
    with h5py.File("fifth.h5", "w") as file:
        file.update(snapshot(5))
        file["time"] = 1.25
        for field in "up":
            (file if where == "attribute of the file" else file[field]).attrs["Time"] = 1.25
    with pytest.raises(UserError, match=r"uneven steps, from 0.25 to 0.5"):
        order([["first.h5", "second.h5", "third.h5", "fifth.h5"]])


def write_openpmd(path: str, times: dict[int, float], seconds: dict[int, float] | None = None) -> None:
    """Write iterations with times in milliseconds, or in units of ``seconds``, and velocities in units of 2 m/s."""
    with h5py.File(path, "w") as file:
        file.attrs["openPMD"] = "1.1.0"
        for number, (iteration, time) in enumerate(times.items(), 1):
            group = file.create_group(f"data/{iteration}")
            group.attrs.update(time=time, dt=0.001, timeUnitSI=(seconds or {}).get(iteration, 1e-3))
            fields = snapshot(number)
            for name, values in zip("xyz", fields["u"], strict=True):
                group[f"meshes/U/{name}"] = values
                group[f"meshes/U/{name}"].attrs["unitSI"] = 2.0
            group["meshes/U"].attrs["unitDimension"] = [1.0, 0, -1, 0, 0, 0, 0]
            group["meshes/p"] = fields["p"]


OPENPMD = {
    "axes": ["x", "y", "z"],
    "velocity": [f"data/*/meshes/U/{axis}" for axis in "xyz"],
    "pressure": "data/*/meshes/p",
    "time_step": None,
}


def openpmd(**changes: Any) -> tuple[list[float], float]:
    """The largest velocity of each snapshot, rounded, and the time step."""
    tree = {**BASE, **OPENPMD, "files": {"train": [["a.h5"]]}, **changes}
    Path("mapping.yaml").write_text(yaml.safe_dump({key: one for key, one in tree.items() if one is not None}))
    (record,) = list_trajectories(import_data(load_mapping("mapping.yaml"), Path("out"), progress=quiet), "train")
    velocity = read_trajectory(record).velocity_T3XYZ
    return [round(float(one)) for one in velocity.min(axis=(1, 2, 3, 4))], record.interval


def test_the_times_and_units_of_openpmd_are_used() -> None:
    write_openpmd("a.h5", {300: 0.0, 100: 250.0, 200: 500.0})  # the names contradict the times
    given = {"time_step": 0.25}
    assert openpmd(**given) == ([2, 4, 6], pytest.approx(0.25))
    assert openpmd(time_step=250.0, units={"length": "cm", "time": "ms"}) == ([0, 0, 1], pytest.approx(250.0))
    with pytest.raises(UserError, match=r"time_step is 0.5, but the times in the files go in steps of 0.25"):
        openpmd(time_step=0.5)
    write_openpmd("a.h5", {100: 0.0, 200: 250.0, 300: 0.5}, seconds={300: 1.0})
    assert openpmd(**given) == ([2, 4, 6], pytest.approx(0.25))
    with pytest.raises(UserError, match=r"scale.velocity is 3"):
        openpmd(**given, scale={"velocity": 3.0})
    write_openpmd("a.h5", {100: 250.0, 200: 250.0, 300: 500.0})
    with pytest.raises(UserError, match=r"are both at time 0.25"):
        openpmd(**given)


def test_times_stay_with_the_file_that_holds_them() -> None:
    """The first file has a time too many and the second one too few: together they are as many as the snapshots."""
    write_numbered("a.h5", [1, 2], [0.0, 0.25, 0.5])
    write_numbered("b.h5", [3, 4], [0.75])
    with pytest.raises(UserError, match=r"a.h5 and b.h5 both hold u_0001"):
        order([["a.h5", "b.h5"]], velocity="u_*", pressure="p_*")


def test_a_file_without_any_of_the_datasets_is_not_skipped() -> None:
    for value in (1, 2, 3):
        np.savez(f"a_{value}.npz", **snapshot(value))
    np.savez("a_2.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"a_2.npz holds no dataset u or p; it has other"):
        order([["a_*.npz"]])
    np.savez("a_2.npz", time=[0.0, 0.25])  # the times of all are in a file of their own
    assert order([["a_*.npz"]], time="time", time_step=None) == [1, 3]


def test_times_that_were_never_set_are_ignored() -> None:
    for value in (1, 2):
        np.savez(f"a_{value}.npz", time=0.0, **snapshot(value))
    assert order([["a_*.npz"]]) == [1, 2]


def test_an_array_with_a_time_axis_is_put_in_order_of_its_times() -> None:
    fields = [snapshot(value) for value in (3, 1, 2)]
    arrays = {name: np.stack([one[name] for one in fields]) for name in "up"}
    np.savez("long.npz", t=[0.5, 0.0, 0.25], **arrays)
    assert order([["long.npz"]], axes=["t", "c", "x", "y", "z"]) == [1, 2, 3]


def test_fields_at_different_times_are_refused() -> None:
    for value in (1, 2, 3):
        np.savez(f"u_{value}.npz", time=0.25 * value, u=snapshot(value)["u"])
        np.savez(f"p_{value}.npz", time=0.25 * value + 0.125, p=snapshot(value)["p"])
    with pytest.raises(UserError, match="p and u are not stored at the same times"):
        order([["u_*.npz", "p_*.npz"]])
    # A field whose files hold no times follows the names, unless the names contradict the times.
    for value in (1, 2, 3):
        np.savez(f"p_{value}.npz", p=snapshot(value)["p"])
    assert order([["u_*.npz", "p_*.npz"]]) == [1, 2, 3]
    with pytest.raises(UserError, match="the names of u are not in the order of their times, and p has no times"):
        order([["u_2.npz", "u_1.npz", "u_3.npz", "p_*.npz"]])


def test_a_gap_in_the_numbers_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (10, 20, 40):
        np.savez(f"a_{value}.npz", **snapshot(value))
    assert order([["a_*.npz"]]) == [10, 20, 40]
    assert "a_20.npz is followed by a_40.npz, which is a larger step" in capsys.readouterr().out
