"""Importing files that hold many trajectories, and arrays that hold velocity and pressure together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.data import list_trajectories, read_provenance, read_trajectory
from shodh_moe.data.importing import import_data, load_mapping
from tests.data.test_import import CONFIGS, GRID, cutouts, flow, imported, mapping_file  # noqa: F401  (a fixture)
from tests.tiny import quiet, refused

SPLITS = {"train": [0, 2], "valid": [2, 3], "test": [3, 4]}
FILES = {split: ["many.h5"] for split in SPLITS}


def flows(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Velocity [N, T, 3, X, Y, Z] and pressure [N, T, X, Y, Z]."""
    made = [flow(seed) for seed in range(count)]
    return np.stack([one[0] for one in made]), np.stack([one[1] for one in made])


def require_flows(out: Path, velocity: np.ndarray, pressure: np.ndarray) -> None:
    """Require that the trajectories of a folder, in the order of the splits, have these values."""
    there = [split for split in SPLITS if any((out / "data" / split).glob("*"))]
    records = [record for split in there for record in list_trajectories(out, split)]
    assert len(records) == len(velocity)
    for record, velocity_T, pressure_T in zip(records, velocity, pressure, strict=True):
        stored = read_trajectory(record)
        np.testing.assert_array_equal(stored.velocity_T3XYZ, velocity_T)
        np.testing.assert_array_equal(stored.pressure_T1XYZ[:, 0], pressure_T)


PDEBENCH: dict[str, Any] = {
    "files": FILES,
    "samples": SPLITS,
    "axes": ["n", "t", "x", "y", "z"],
    "velocity": ["Vx", "Vy", "Vz"],
    "pressure": "pressure",
    "spacing": None,
    "coordinates": {axis: f"{axis}-coordinate" for axis in "xyz"},
    "time_step": None,
    "time": "t-coordinate",
}


def write_pdebench(path: Path, velocity: np.ndarray, pressure: np.ndarray) -> None:
    """Write the arrays of PDEBench's 3D_CFD files: [N, T, X, Y, Z], and one time more than there are snapshots."""
    arrays = {f"V{axis}": velocity[:, :, index] for index, axis in enumerate("xyz")}
    arrays |= {"pressure": pressure, "density": pressure + 1}
    arrays |= {f"{axis}-coordinate": 0.5 * np.arange(size) for axis, size in zip("xyz", GRID, strict=True)}
    arrays["t-coordinate"] = 0.25 * np.arange(velocity.shape[1] + 1)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values


@pytest.mark.parametrize("ending", ["h5", "npz"])
def test_the_trajectories_along_an_axis_become_one_file_each(cutouts: Path, ending: str) -> None:  # noqa: F811
    velocity, pressure = flows()
    write_pdebench(cutouts / f"many.{ending}", velocity, pressure)
    out = imported(cutouts, **{**PDEBENCH, "files": {split: [f"many.{ending}"] for split in SPLITS}})
    require_flows(out, velocity, pressure)
    record = list_trajectories(out, "valid")[0]
    assert (record.interval, record.spacing) == (0.25, (0.5, 0.5, 0.5))
    assert read_provenance(record.path)["sample"] == "2"


def test_without_ranges_every_trajectory_of_every_file_is_imported(cutouts: Path) -> None:  # noqa: F811
    velocity, pressure = flows()
    for name, first, stop in (("a", 0, 2), ("b", 2, 3), ("c", 3, 4)):
        write_pdebench(cutouts / f"{name}.h5", velocity[first:stop], pressure[first:stop])
    files = {"train": ["[ab].h5"], "test": ["c.h5"]}
    out = imported(cutouts, **{**PDEBENCH, "files": files, "samples": None})
    require_flows(out, velocity, pressure)
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*.hdf5")}
    imported(cutouts, **{**PDEBENCH, "files": files, "samples": None})
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.hdf5")} == again


def test_the_well_without_pressure(cutouts: Path) -> None:  # noqa: F811
    """Use the shipped mapping on files in the Well's format, which training refuses."""
    velocity, pressure = flows()
    for split, first, stop in (("train", 0, 2), ("valid", 2, 3), ("test", 3, 4)):
        path = cutouts / f"datasets/MHD_64/data/{split}/MHD.hdf5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["t0_fields/density"] = pressure[first:stop]
            file["t1_fields/velocity"] = np.moveaxis(velocity[first:stop], 2, -1)
            file["dimensions/time"] = 0.25 * np.arange(3)
            for axis, size in zip("xyz", GRID, strict=True):
                file[f"dimensions/{axis}"] = 0.5 * np.arange(size)
    with pytest.raises(UserError, match=r"MHD.hdf5 has no t0_fields/pressure, its t0_fields hold density: import it"):
        list_trajectories(cutouts / "datasets/MHD_64", "train")
    out = import_data(load_mapping(CONFIGS / "the_well.yaml"), progress=quiet)
    require_flows(out, velocity, 0 * pressure)
    # Another field may stand for the pressure.
    mapping = load_mapping(CONFIGS / "the_well.yaml").model_copy(update={"pressure": "t0_fields/density"})
    require_flows(import_data(mapping, cutouts / "dense", progress=quiet), velocity, pressure)


def test_times_and_masks_of_each_trajectory(cutouts: Path) -> None:  # noqa: F811
    velocity, pressure = flows()
    write_pdebench(cutouts / "many.h5", velocity, pressure)
    with h5py.File(cutouts / "many.h5", "a") as file:
        file["times"] = np.arange(4)[:, None] + 0.25 * np.arange(3)
        mask = np.zeros((4, *GRID))
        mask[1::2, 0, 0, :3] = 1
        file["mask"] = mask
    out = imported(cutouts, **{**PDEBENCH, "time": "times", "mask": {"dataset": "mask"}})
    velocity[1::2, ..., 0, 0, :3], pressure[1::2, ..., 0, 0, :3] = 0, 0
    require_flows(out, velocity, pressure)
    records = list_trajectories(out, "train")
    assert [read_trajectory(record).solid_1XYZ.sum() for record in records] == [0, 3]
    assert [read_provenance(record.path)["start_time"] for record in records] == [0, 1]


@pytest.mark.parametrize("numbered", [False, True])
def test_a_group_for_each_trajectory(cutouts: Path, numbered: bool) -> None:  # noqa: F811
    """The order is that of the numbers in the names, 9 before 10."""
    velocity, pressure = flows()
    with h5py.File(cutouts / "many.h5", "w") as file:
        for name, velocity_T, pressure_T in zip((8, 9, 10, 11), velocity, pressure, strict=True):
            if numbered:
                for time in range(3):
                    file[f"sims/{name}/u_{time}"], file[f"sims/{name}/p_{time}"] = velocity_T[time], pressure_T[time]
            else:
                file[f"sims/{name}/u"], file[f"sims/{name}/p"] = velocity_T.swapaxes(0, 1), pressure_T
    star, axes = ("_*", ["c", "x", "y", "z"]) if numbered else ("", ["c", "t", "x", "y", "z"])
    names = {"velocity": f"sims/{{n}}/u{star}", "pressure": f"sims/{{n}}/p{star}"}
    out = imported(cutouts, files=FILES, samples=SPLITS, axes=axes, **names)
    require_flows(out, velocity, pressure)
    assert read_provenance(list_trajectories(out, "valid")[0].path)["sample"] == "10"


@pytest.mark.parametrize(
    ("components", "pressure"),
    [(["x", "y", "z", "p"], None), (["skip", "p", "z", "y", "x"], None), (["x", "skip", "y", "z"], "zero")],
)
def test_velocity_and_pressure_as_channels_of_one_array(
    cutouts: Path,  # noqa: F811
    components: list[str],
    pressure: str | None,
) -> None:
    velocity_NT3, pressure_NT = flows()
    fields = dict(zip("xyz", np.moveaxis(velocity_NT3, 2, 0), strict=True)) | {
        "p": pressure_NT,
        "skip": pressure_NT + 9,
    }
    with h5py.File(cutouts / "many.h5", "w") as file:
        file["data"] = np.stack([fields[name] for name in components], -1)
    axes = ["n", "t", "x", "y", "z", "c"]
    changes = {"axes": axes, "velocity": "data", "components": components, "pressure": pressure}
    out = imported(cutouts, files=FILES, samples=SPLITS, **changes)
    require_flows(out, velocity_NT3, 0 * pressure_NT if pressure else pressure_NT)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"samples": {"train": [0, 9]}}, ("samples.train ends at 9", "many.h5 holds 4 trajectories")),
        ({"samples": {"train": [1, 1]}}, ("samples.train [1, 1] is empty",)),
        ({"samples": None}, ("many.h5 is in train and in valid", "`samples`")),
        ({"axes": ["t", "x", "y", "z"]}, ("samples is for files with many trajectories", "add n to axes")),
        ({"pressure": "other"}, ("other has shape (3, 3, 8, 16, 24)", "the velocity has 4 trajectories")),
        ({"pressure": "shared"}, ("shared has shape (3, 8, 16, 24)", "the velocity has 4 trajectories")),
        ({"velocity": ["{n}/u", "{n}/v", "w"]}, ("{n} in {n}/u stands for a trajectory", "leave n out of axes")),
        ({"components": ["x", "y", "z", "p"]}, ("components is for one array",)),
        ({"velocity": "Vx", "components": ["x", "y", "p"]}, ("components must name x, y and z",)),
    ],
)
def test_mistakes_in_many_trajectories_are_named(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    messages: tuple[str, ...],
) -> None:
    velocity, pressure = flows()
    write_pdebench(cutouts / "many.h5", velocity, pressure)
    with h5py.File(cutouts / "many.h5", "a") as file:
        file["other"], file["shared"] = pressure[:3], pressure[0]
    if changes.get("velocity") == "Vx":
        changes = {**changes, "axes": ["n", "t", "x", "y", "z", "c"]}
    mapping = mapping_file(cutouts, **{**PDEBENCH, **changes})
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=messages)
    assert not list(cutouts.rglob("out/data/*/*"))


def test_more_channels_than_the_velocity_are_explained(cutouts: Path) -> None:  # noqa: F811
    with h5py.File(cutouts / "many.h5", "w") as file:
        file["data"] = np.zeros((4, 3, *GRID, 5))
    axes = ["n", "t", "x", "y", "z", "c"]
    with pytest.raises(UserError, match=r"expected 3 along c of .*; if it holds more than the velocity"):
        imported(cutouts, files=FILES, samples=SPLITS, axes=axes, velocity="data", pressure="zero")


def test_a_file_that_cannot_be_read_is_left_out(cutouts: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    from shodh_moe.cli import main

    velocity, pressure = flows()
    write_pdebench(cutouts / "many.h5", velocity, pressure)
    (cutouts / "bad.h5").write_bytes((cutouts / "many.h5").read_bytes()[:9000])
    files = {"train": ["bad.h5", "many.h5"]}
    mapping = mapping_file(cutouts, **{**PDEBENCH, "files": files, "samples": None, "output": "out"})
    assert main(["data", "import", str(mapping)]) == 2
    assert main(["data", "import", str(mapping), "--skip-bad"]) == 0
    assert "left out: box_0000.hdf5: cannot read bad.h5 (" in capsys.readouterr().out
    require_flows(cutouts / "out", velocity, pressure)
