"""Importing a user's arrays: the files in our layout, and the errors that name mistakes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from scipy.io import netcdf_file

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.config.window import Window
from shodh_moe.data import (
    FieldStats,
    compute_stats,
    list_trajectories,
    read_provenance,
    read_trajectory,
    require_trainable,
    stats,
)
from shodh_moe.data.importing import Mapping, import_data, load_mapping
from shodh_moe.data.importing.grids import interpolation
from shodh_moe.data.importing.order import number_key
from shodh_moe.data.importing.projection import project
from shodh_moe.formats.known import open_here
from tests.tiny import quiet, refused, smooth

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "import"
GRID = (8, 16, 24)
BASE: dict[str, Any] = {
    "name": "theirs",
    "domain": "box",
    "axes": ["z", "y", "x", "c"],
    "velocity": "Velocity_*",
    "pressure": "Pressure_*",
    "spacing": 0.5,
    "time_step": 0.25,
    "boundaries": {"x": "periodic", "y": "periodic", "z": "periodic"},
    "units": {"length": "m", "time": "s"},
}


def flow(seed: int, snapshots: int = 3, grid: tuple[int, ...] = GRID) -> tuple[np.ndarray, np.ndarray]:
    """Velocity [T, 3, X, Y, Z] and pressure [T, X, Y, Z], float32."""
    rng = np.random.default_rng(seed)
    velocity, pressure = rng.standard_normal((snapshots, 3, *grid)), rng.standard_normal((snapshots, *grid))
    return velocity.astype(np.float32), pressure.astype(np.float32)


def write_cutout(
    path: Path, velocity: np.ndarray | None, pressure: np.ndarray | None, points: list[np.ndarray], first: int = 1
) -> None:
    """Write a file in the format of JHTDB's cutout service: numbered datasets [z, y, x, component], 1D coordinates."""
    with h5py.File(path, "w") as file:
        for axis, values in zip("xyz", points, strict=True):
            file[f"{axis}coor"] = values.astype(np.float32)
        for name, fields in (("Velocity", velocity), ("Pressure", pressure)):
            for number, values in enumerate(() if fields is None else fields, start=first):
                stored = values.T if name == "Pressure" else values.transpose(3, 2, 1, 0)
                file[f"{name}_{number:04d}"] = stored[..., None] if name == "Pressure" else stored


def even_points(grid: tuple[int, ...] = GRID, spacing: float = 0.5) -> list[np.ndarray]:
    return [spacing * np.arange(size) for size in grid]


@pytest.fixture
def cutouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three trajectories of cutouts in the working folder."""
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(("train", "valid", "test")):
        write_cutout(tmp_path / f"{split}.h5", *flow(seed), even_points())
    return tmp_path


def mapping_file(folder: Path, **changes: Any) -> Path:
    tree = {**BASE, "files": {split: [f"{split}.h5"] for split in ("train", "valid", "test")}, **changes}
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}), encoding="utf-8")
    return path


def imported(folder: Path, **changes: Any) -> Path:
    return import_data(load_mapping(mapping_file(folder, **changes)), folder / "out", progress=quiet)


def test_imported_files_can_be_trained_on(cutouts: Path) -> None:
    out = imported(cutouts, scalars={"viscosity": 0.01})
    velocity, pressure = flow(0)
    (record,) = list_trajectories(out, "train")
    assert (record.domain, record.grid, record.n_snapshots, record.periodic) == ("box", GRID, 3, (True,) * 3)
    trajectory = read_trajectory(record)
    np.testing.assert_array_equal(trajectory.velocity_T3XYZ, velocity)
    np.testing.assert_array_equal(trajectory.pressure_T1XYZ[:, 0], pressure)
    require_trainable(out, GRID, {split: Window(history=2) for split in ("train", "valid", "test")}, batch_size=4)
    assert FieldStats.load(out).velocity_rms == pytest.approx(1, rel=0.05)
    # The statistics equal those of whole trajectories, to the last digit.
    assert yaml.safe_load((out / "stats.yaml").read_text()) == compute_stats([trajectory])
    provenance = read_provenance(record.path)
    assert provenance["label"] == "imported"
    assert provenance["units"].startswith("length in m, time in s, velocity in m/s, pressure in (m/s)^2")
    with h5py.File(record.path) as file:
        assert file["dimensions/time"][:].tolist() == [0, 0.25, 0.5]
        assert file["dimensions/x"][:3].tolist() == [0.25, 0.75, 1.25]
        assert file["scalars/viscosity"][()] == file.attrs["viscosity"] == np.float32(0.01)
        assert list(file["scalars"].attrs["field_names"]) == ["viscosity"]
        assert file["boundary_conditions/x_periodic"].attrs["bc_type"] == "PERIODIC"


def test_the_well_reads_an_imported_folder(cutouts: Path) -> None:
    well = pytest.importorskip("the_well.data")
    out = imported(cutouts, boundaries={"x": "periodic", "y": ["wall", "free slip"], "z": "open"})
    data = well.WellDataset(path=str(out), well_split_name="train")
    velocity, pressure = flow(0)
    assert len(data) == 2
    sample = data[0]
    assert sample["boundary_conditions"].tolist() == [[2, 2], [0, 0], [1, 1]]
    np.testing.assert_array_equal(sample["input_fields"][0, ..., 0], pressure[0])
    np.testing.assert_array_equal(np.moveaxis(sample["input_fields"][0, ..., 1:].numpy(), -1, 0), velocity[0])


def test_a_second_import_keeps_existing_files(cutouts: Path) -> None:
    out = imported(cutouts)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.hdf5")}
    (out / "data/valid/box_0000.hdf5").unlink()
    assert imported(cutouts) == out
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*.hdf5")}
    assert [path.parent.name for path in times if again[path] != times[path]] == ["valid"]
    imported(cutouts, scale={"velocity": 2.0})
    np.testing.assert_array_equal(read_trajectory(out / "data/train/box_0000.hdf5").velocity_T3XYZ, 2 * flow(0)[0])


def test_velocity_and_pressure_in_separate_files_of_one_snapshot(cutouts: Path) -> None:
    velocity, pressure = flow(0, 12)
    for number in range(12):
        write_cutout(cutouts / f"part_u_{number}.h5", velocity[number : number + 1], None, even_points(), number + 1)
        write_cutout(cutouts / f"part_p_{number}.h5", None, pressure[number : number + 1], even_points(), number + 1)
    out = imported(cutouts, files={"train": [["part_p_*.h5", "part_u_*.h5"]]}, snapshots={"train": [8, 11]})
    trajectory = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(trajectory.velocity_T3XYZ, velocity[8:11])
    np.testing.assert_array_equal(trajectory.pressure_T1XYZ[:, 0], pressure[8:11])
    assert sorted(["a10b2", "a9b10", "a9b9"], key=number_key) == ["a9b9", "a9b10", "a10b2"]


def write_axes(path: Path, velocity: np.ndarray, pressure: np.ndarray, mask: np.ndarray) -> None:
    """Write the flow as one array per component with a time axis, in the format of the file's extension."""
    arrays = {**dict(zip("uvw", velocity.swapaxes(0, 1), strict=True)), "p": pressure, "fluid": mask}
    times = 3 + 0.25 * np.arange(len(pressure))
    if path.suffix == ".npz":
        np.savez_compressed(path, time=times, **arrays)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file.create_dataset(f"fields/{name}", data=values.astype(">f8"))
            file["fields/time"] = times
    else:
        with netcdf_file(path, "w") as file:
            for name, size in (("t", None), ("x", GRID[0]), ("y", GRID[1]), ("z", GRID[2])):
                file.createDimension(name, size)
            for name, values in {**arrays, "time": times}.items():
                axes = {4: ("t", "x", "y", "z"), 3: ("x", "y", "z"), 1: ("t",)}[values.ndim]
                stored = file.createVariable(name, "f8", axes)
                if name == "u":  # packed, with missing values
                    stored.scale_factor, stored.add_offset, stored._FillValue = 2.0, 1.0, 1e20
                    values = np.where(np.isnan(values), 1e20, (values - 1) / 2)
                stored[:] = values


@pytest.mark.parametrize("ending", ["npz", "h5", "nc"])
def test_file_formats_and_a_mask(cutouts: Path, ending: str) -> None:
    fluid = np.ones(GRID)
    fluid[2:4, 5, 6:9] = 0
    velocity, pressure = (values.astype(np.float64) for values in flow(3))
    velocity[:, :, 2, 5, 6] = np.nan
    write_axes(cutouts / f"flow.{ending}", velocity, pressure, fluid)
    prefix = "fields/" if ending == "h5" else ""
    out = imported(
        cutouts,
        files={"train": [f"flow.{ending}"]},
        axes=["t", "x", "y", "z"],
        velocity=[f"{prefix}{name}" for name in "uvw"],
        pressure=f"{prefix}p",
        mask={"dataset": f"{prefix}fluid", "inverted": True},
        time_step=None,
        time=f"{prefix}time",
    )
    trajectory = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(trajectory.solid_1XYZ[0], 1 - fluid)
    expected = np.where(fluid, np.nan_to_num(velocity), 0)
    np.testing.assert_allclose(trajectory.velocity_T3XYZ, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(trajectory.pressure_T1XYZ[:, 0], np.where(fluid, pressure, 0), rtol=1e-6)
    provenance = read_provenance(trajectory.record.path)
    assert provenance["start_time"] == 3
    assert provenance["speed_in_solids_set_to_zero"] > 0.5
    with h5py.File(trajectory.record.path) as file:
        assert file["dimensions/time"][:].tolist() == [0, 0.25, 0.5]


def test_only_one_snapshot_of_a_long_array_is_in_memory(cutouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(stats, "_BLOCK_BYTES", 0)

    shape = (40, *GRID)
    zeros = {name: np.zeros(shape, dtype=np.float32) for name in "uvw"}
    np.savez_compressed(cutouts / "long.npz", p=np.ones(shape, dtype=np.float32), **zeros)
    tracemalloc.start()
    changes = {"axes": ["t", "x", "y", "z"], "velocity": list("uvw"), "pressure": "p"}
    imported(cutouts, files={"train": ["long.npz"]}, **changes)
    assert tracemalloc.get_traced_memory()[1] < 40 * 4 * 4 * np.prod(GRID) / 2
    tracemalloc.reset_peak()
    # The values were read in another process; read them here as well.
    with open_here(cutouts / "long.npz") as file:
        for name, number in itertools.product("uvwp", range(40)):
            assert (file.array(name).read((number, *[slice(None)] * 3)) == (name == "p")).all()
    assert tracemalloc.get_traced_memory()[1] < 40 * 4 * 4 * np.prod(GRID) / 2
    tracemalloc.stop()


@pytest.mark.parametrize("degree", [1, 3])
def test_interpolation_is_exact_for_its_degree(degree: int) -> None:
    rng = np.random.default_rng(0)
    old, new = np.cumsum(rng.uniform(0.1, 1, 20)), np.linspace(1.5, 6, 33)
    matrix = interpolation(old, new, {1: "linear", 3: "cubic"}[degree])
    for power in range(degree + 1):
        np.testing.assert_allclose(matrix @ old**power, new**power, rtol=1e-9)
    assert np.abs(matrix @ old ** (degree + 1) - new ** (degree + 1)).max() > 1e-3


def test_a_periodic_axis_is_interpolated_across_its_end() -> None:
    old, new = np.arange(32) * 2 * np.pi / 32, np.arange(48) * 2 * np.pi / 48
    matrix = interpolation(old, new, "cubic", 2 * np.pi)
    np.testing.assert_allclose(matrix @ np.sin(old), np.sin(new), atol=1e-5)


def channel(walls: np.ndarray) -> list[np.ndarray]:
    return [0.25 * np.arange(24), walls, 0.125 * np.arange(40)]


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_the_channel_mapping_resamples_to_cubic_cells(cutouts: Path, method: str) -> None:
    """Use the shipped mapping of JHTDB's channel on a small cutout with points denser near the walls."""
    points = channel(np.tanh(np.linspace(-2, 2, 33)) / np.tanh(2))
    degree = {"linear": 1, "cubic": 3}[method]
    x, y, z = np.meshgrid(*[one.astype(np.float32).astype(float) for one in points], indexing="ij")
    velocity, pressure = np.stack([y**degree, 0 * y + 2, x]), z + 1
    (cutouts / "cutouts").mkdir()
    for name in "abcd":
        u = np.stack([velocity, velocity * 2])
        write_cutout(cutouts / f"cutouts/channel_{name}_u.h5", u, None, points)
        write_cutout(cutouts / f"cutouts/channel_{name}_p.h5", None, np.stack([pressure, pressure]), points)
    tree = yaml.safe_load((CONFIGS / "jhtdb_channel.yaml").read_text())
    tree["resample"] = {"method": method, "spacing": 0.125, "cells": [40, 16, 32]}
    tree["project"] = False
    (cutouts / "channel.yaml").write_text(yaml.safe_dump(tree))
    out = import_data(load_mapping(cutouts / "channel.yaml"), progress=quiet)
    records = list_trajectories(out, "train")
    assert str(out) == "data/jhtdb_channel"
    assert [(r.grid, r.periodic) for r in records] == [((40, 16, 32), (False,) * 3)] * 2
    trajectory = read_trajectory(records[0])
    expected = -1 + 0.125 * (np.arange(16) + 0.5)
    assert np.abs(trajectory.velocity_T3XYZ[0, 0] - (expected**degree)[:, None]).max() < 1e-5
    assert np.abs(trajectory.velocity_T3XYZ[1, 2, :, 0, 0] - 2 * 0.125 * (np.arange(40) + 0.5)).max() < 1e-5
    assert np.abs(trajectory.pressure_T1XYZ[0, 0, 0, 0] - 1 - 0.125 * (np.arange(32) + 0.5)).max() < 1e-5
    resampled = read_provenance(records[0].path)["resampled"]
    assert (resampled["method"], resampled["spacing"]) == (method, 0.125)
    with h5py.File(records[0].path) as file:
        assert sorted(file["boundary_conditions"]) == [
            *("x_open_high", "x_open_low"),
            *("y_wall_high", "y_wall_low"),
            *("z_open_high", "z_open_low"),
        ]


def test_the_isotropic_mapping_keeps_the_values(cutouts: Path) -> None:
    (cutouts / "cutouts").mkdir()
    for seed, name in enumerate("abcd"):
        write_cutout(
            cutouts / f"cutouts/isotropic_{name}_1.h5", *flow(seed), even_points(GRID, 2 * np.pi / 1024), first=9
        )
    out = import_data(load_mapping(CONFIGS / "jhtdb_isotropic.yaml"), progress=quiet)
    np.testing.assert_array_equal(read_trajectory(list_trajectories(out, "test")[0]).velocity_T3XYZ, flow(3)[0])


def test_the_examples_in_the_docs_are_valid(tmp_path: Path) -> None:
    text = (CONFIGS.parents[1] / "docs" / "import.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for example in examples:
        (tmp_path / "mapping.yaml").write_text(example)
        load_mapping(tmp_path / "mapping.yaml")
    assert len(examples) == 2
    # The table lists every key.
    assert [key for key in Mapping.model_fields if f"`{key}" not in text] == []


def divergence(u_3XYZ: np.ndarray) -> np.ndarray:
    k = [2j * np.pi * np.fft.fftfreq(n) * (np.arange(n) != n // 2) for n in u_3XYZ.shape[1:]]
    modes = np.fft.fftn(u_3XYZ, axes=(1, 2, 3))
    total = k[0][:, None, None] * modes[0] + k[1][:, None] * modes[1] + k[2] * modes[2]
    return np.asarray(np.fft.ifftn(total).real)


def test_projection_removes_the_divergence_and_nothing_else(cutouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    u = smooth(np.random.default_rng(0), 3, *GRID)
    projected, share = project(u, ["periodic"] * 3)
    assert np.abs(divergence(u)).max() > 0.01
    assert np.abs(divergence(projected)).max() < 1e-14
    assert 0.1 < share < 0.9
    again, left = project(projected, ["periodic"] * 3)
    np.testing.assert_allclose(again, projected, atol=1e-14)
    assert left < 1e-28
    # The removed part is a gradient, so it is orthogonal to the rest.
    assert abs(np.sum((u - projected) * projected)) < 1e-12
    write_cutout(cutouts / "train.h5", np.stack([u, u]), flow(0)[1][:2], even_points())
    out = imported(cutouts, project=True)
    stored = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_allclose(stored.velocity_T3XYZ[1], projected, atol=1e-7)
    provenance = read_provenance(stored.record.path)
    assert provenance["projection_removed_energy"] == pytest.approx(share, rel=1e-4)
    assert f"projection removed {share:.3g} of the velocity's energy" in capsys.readouterr().out


def test_projection_between_walls_and_at_open_ends() -> None:
    places = [(np.arange(n) + 0.5) / n for n in (16, 16, 16)]
    x, y, z = np.meshgrid(*places, indexing="ij")
    # Divergence-free, no flow through the walls z = 0 and 1, in and out at the open ends of x, periodic along y.
    free = np.stack([np.cos(np.pi * z), 0 * y, 0 * z]) + np.stack(
        [
            -np.cos(np.pi * x) * np.cos(np.pi * z),
            0 * x,
            -np.sin(np.pi * x) * np.sin(np.pi * z),
        ]
    )
    kept, share = project(free, ["open", "periodic", "wall"])
    np.testing.assert_allclose(kept, free, atol=1e-14)
    assert share < 1e-28
    # A gradient that satisfies the same boundary conditions is removed completely.
    potential_slopes = np.stack(
        [
            np.cos(np.pi * x) * np.cos(2 * np.pi * y) * np.cos(np.pi * z),
            -2 * np.sin(np.pi * x) * np.sin(2 * np.pi * y) * np.cos(np.pi * z),
            -np.sin(np.pi * x) * np.cos(2 * np.pi * y) * np.sin(np.pi * z),
        ]
    )
    kept, share = project(free + 0.1 * potential_slopes, ["open", "periodic", "wall"])
    np.testing.assert_allclose(kept, free, atol=1e-14)


def write_faulty(folder: Path, fault: str) -> None:
    velocity, pressure = flow(0)
    points = even_points()
    if fault == "nan":
        pressure[1, 2, 3, 4] = np.nan
    if fault == "uneven":
        points[1] = points[1] ** 1.5
    if fault == "unordered":
        points[2] = np.append(points[2][1:], 0)
    if fault == "short":
        pressure = pressure[:2]
    if fault == "odd":
        velocity, pressure, points = velocity[..., :-1], pressure[..., :-1], [*points[:2], points[2][:-1]]
    write_cutout(folder / "train.h5", velocity, pressure, points)
    if fault == "truncated":
        (folder / "train.h5").write_bytes((folder / "train.h5").read_bytes()[:20_000])
    if fault == "text":
        (folder / "train.h5").write_text("x")
    if fault == "link":
        with h5py.File(folder / "train.h5", "a") as file:
            del file["Pressure_0002"]
            file["Pressure_0002"] = h5py.ExternalLink("valid.h5", "Pressure_0002")


@pytest.mark.parametrize(
    ("fault", "changes", "messages"),
    [
        ("", {"velosity": 1}, ("mapping.yaml", "unknown key 'velosity'", "'velocity'")),
        ("", {"resample": {"metod": "cubic", "spacing": 1.0}}, ("resample.metod", "resample.method")),
        ("", {"units": None}, ("mapping.yaml", "'units' is missing")),
        ("", {"pressure": None}, ("training needs a pressure", "pressure: zero")),
        ("", {"velocity": "u"}, ("train.h5", "no dataset 'u'", "Velocity_0001")),
        ("", {"axes": ["z", "y", "x"]}, ("axes must name", "c")),
        ("", {"axes": ["t", "z", "y", "x", "c"]}, ("Velocity_0001", "shape (24, 16, 8, 3)", "[t, z, y, x, c]")),
        ("", {"axes": ["c", "z", "y", "x"]}, ("expected 3 along c of [c, z, y, x]",)),
        ("", {"files": {"train": ["nowhere*.h5"]}}, ("files.train", "nowhere*.h5")),
        ("", {"files": {"train": ["train.h5"], "test": ["train.h5"]}}, ("is in train and in test",)),
        ("", {"spacing": [1.0, 1.0, 2.0]}, ("not cubic", "z: 2", "resample")),
        ("", {"spacing": None}, ("either spacing or coordinates",)),
        ("", {"crop": {"x": [0, 4]}}, ("axis x is cropped", "open")),
        ("", {"snapshots": {"train": [2, 9]}}, ("2..9 of 3",)),
        ("", {"project": True, "mask": {"dataset": "m"}}, ("project does not support solids",)),
        ("", {"resample": {"method": "linear", "spacing": 0.7}}, ("period of axis x, 4", "0.666666667")),
        ("", {"repeated_end": ["x"], "boundaries": dict.fromkeys("xyz", "open")}, ("axis x is not periodic", "crop.x")),
        ("", {"repeated_end": ["x"]}, ("last point along x does not repeat the first", "out of repeated_end")),
        ("nan", {}, ("train.h5", "pressure of snapshot 1", "not finite", "solid: missing")),
        ("uneven", {"spacing": None, "coordinates": {a: f"{a}coor" for a in "xyz"}}, ("not cubic", "y: 0.3536 to")),
        (
            "unordered",
            {"spacing": None, "coordinates": {a: f"{a}coor" for a in "xyz"}},
            ("zcoor neither increases nor decreases",),
        ),
        ("short", {}, ("3 of Velocity_*, 2 of Pressure_*",)),
        ("odd", {}, ("23 cells along z", "multiple of 8", "crop")),
        ("odd", {"crop": "auto"}, ("would remove 7 cells along z, which is periodic",)),
        ("truncated", {}, ("train.h5", "truncated")),
        ("text", {}, ("train.h5", "not HDF5, NetCDF 3 or 4, or npz")),
        ("link", {}, ("train.h5: Pressure_0002 is a link to Pressure_0002 in valid.h5",)),
    ],
)
def test_each_mistake_is_named_in_one_line(
    cutouts: Path, capfd: pytest.CaptureFixture[str], fault: str, changes: dict[str, Any], messages: tuple[str, ...]
) -> None:
    write_faulty(cutouts, fault)
    refused(capfd, "data", "import", str(mapping_file(cutouts, **changes)), "--output", "out", says=messages)
    assert not list(cutouts.rglob("out/data/train/*"))


def test_crop_and_pressure_of_zero(cutouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faulty(cutouts, "odd")
    ends = {"x": "periodic", "y": "wall", "z": "open"}
    out = imported(cutouts, files={"train": ["train.h5"]}, crop={"y": [1, 9], "z": [3, 19]}, boundaries=ends)
    velocity, _ = flow(0)
    stored = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(stored.velocity_T3XYZ, velocity[..., 1:9, 3:19])
    out = imported(cutouts, files={"train": ["train.h5"]}, crop="auto", boundaries=ends, pressure="zero")
    stored = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(stored.velocity_T3XYZ, velocity[..., :16])
    assert not stored.pressure_T1XYZ.any()
    assert "pressure is zero everywhere" in capsys.readouterr().out


@pytest.mark.parametrize("size", [8, 9])
def test_a_periodic_box_stored_with_both_ends(cutouts: Path, size: int) -> None:
    """N + 1 points are refused, also where that is a multiple of 8, unless the mapping drops the repeated end."""
    grid = (size - 1, 16, 24)
    rng = np.random.default_rng(0)
    velocity = smooth(rng, 3, 3, *grid).astype(np.float32)
    closed = np.concatenate([velocity, velocity[:, :, :1] * (1 + 1e-6)], 2)
    pressure = smooth(rng, 3, *closed.shape[2:])
    write_cutout(cutouts / "closed.h5", closed, pressure, even_points(closed.shape[2:]))
    changes: dict[str, Any] = {"files": {"train": ["closed.h5"]}, "spacing": None}
    changes["coordinates"] = {axis: f"{axis}coor" for axis in "xyz"}
    with pytest.raises(UserError, match=r"last point along x repeats the first.*repeated_end: \[x\]"):
        imported(cutouts, **changes)
    if size == 8:
        with pytest.raises(UserError, match="the grid has 7 cells along x, which is periodic"):
            imported(cutouts, **changes, repeated_end=["x"])
        return
    record = list_trajectories(imported(cutouts, **changes, repeated_end=["x"]), "train")[0]
    assert (record.grid, record.periodic) == ((8, 16, 24), (True,) * 3)
    stored = read_trajectory(record)
    np.testing.assert_array_equal(stored.velocity_T3XYZ, velocity)
    np.testing.assert_array_equal(stored.pressure_T1XYZ[:, 0], pressure[:, :8].astype(np.float32))


@pytest.mark.parametrize("kind", ["walls in the planes", "no change along x", "mirror image"])
def test_planes_that_cannot_tell_are_no_repeated_end(cutouts: Path, kind: str) -> None:
    velocity, pressure = flow(0)
    if kind == "walls in the planes":
        velocity[:, :, [0, -1]] = 0
    elif kind == "no change along x":
        velocity[:] = velocity[:, :, :1]
    else:
        velocity[:, :, 4:] = velocity[:, :, 3::-1]
    write_cutout(cutouts / "train.h5", velocity, pressure, even_points())
    np.testing.assert_array_equal(
        read_trajectory(list_trajectories(imported(cutouts), "train")[0]).velocity_T3XYZ, velocity
    )


def test_messages_about_a_periodic_grid_lead_out(cutouts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """N + 1 points whose values cannot tell (no change along x): the first message names the key that helps."""
    velocity, pressure = flow(0, grid=(9, 16, 24))
    velocity[:] = velocity[:, :, :1]
    write_cutout(cutouts / "train.h5", velocity, pressure, even_points((9, 16, 24)))
    mapping = mapping_file(cutouts, files={"train": ["train.h5"]})
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=("repeats the first", "repeated_end: [x]"))
    out = imported(cutouts, files={"train": ["train.h5"]}, repeated_end=["x"])
    assert list_trajectories(out, "train")[0].grid == (8, 16, 24)
    # Several axes are named at once.
    velocity, pressure = flow(0, grid=(9, 17, 24))
    velocity[:, :, -1] = velocity[:, :, 0]
    velocity[:, :, :, -1] = velocity[:, :, :, 0]
    write_cutout(cutouts / "train.h5", velocity, pressure, even_points((9, 17, 24)))
    mapping = mapping_file(cutouts, files={"train": ["train.h5"]})
    says = ("along x and y repeats the first", "repeated_end: [x, y]")
    refused(capfd, "data", "import", str(mapping), "--output", "both", says=says)


@pytest.mark.parametrize(
    ("ends", "kept"),
    [
        ("open", slice(0, 16)),
        (["wall", "open"], slice(0, 16)),
        (["open", "wall"], slice(7, 23)),
        (["open", "free slip"], slice(7, 23)),
        ("wall", None),
        (["wall", "free slip"], None),
    ],
)
def test_crop_auto_keeps_the_walls(cutouts: Path, ends: str | list[str], kept: slice | None) -> None:
    write_faulty(cutouts, "odd")
    changes = {"crop": "auto", "boundaries": {"x": "periodic", "y": "periodic", "z": ends}}
    changes["files"] = {"train": ["train.h5"]}
    if kept is None:
        with pytest.raises(UserError, match="remove 7 of 23 cells along z and with them one of its two walls"):
            imported(cutouts, **changes)
        with pytest.raises(UserError, match=r"set crop.z, or choose resample"):
            imported(cutouts, **{**changes, "crop": None})
        return
    (record,) = list_trajectories(imported(cutouts, **changes), "train")
    stored = read_trajectory(record)
    np.testing.assert_array_equal(stored.velocity_T3XYZ, flow(0)[0][..., kept])
    np.testing.assert_array_equal(stored.pressure_T1XYZ[:, 0], flow(0)[1][..., kept])
    assert read_provenance(record.path)["origin"] == [0, 0, 0.5 * kept.start]


def test_resampling_to_fewer_cells_keeps_the_wall(cutouts: Path) -> None:
    ends = {"x": "open", "y": "open", "z": ["open", "wall"]}
    resample = {"method": "linear", "spacing": 0.4, "cells": [8, 16, 16]}
    with pytest.raises(UserError, match=r"16 along z, but 28 of size 0\.4 fit: fewer would cut off the wall"):
        imported(cutouts, boundaries=ends, resample=resample)
    assert list_trajectories(imported(cutouts, boundaries={**ends, "z": "open"}, resample=resample), "train")


def test_skip_bad_continues_and_lists_skipped_files(cutouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cutouts / "bad.h5").write_bytes(b"no HDF5")
    mapping = mapping_file(cutouts, files={"train": ["bad.h5", "train.h5"], "valid": ["valid.h5"]}, output="out")
    assert main(["data", "import", str(mapping)]) == 2
    assert main(["data", "import", str(mapping), "--skip-bad"]) == 0
    output = capsys.readouterr().out
    assert "left out: box_0000.hdf5: bad.h5 is not HDF5, NetCDF" in output
    assert "no trajectories for test" in output
    assert [record.path.name for record in list_trajectories(cutouts / "out", "train")] == ["box_0001.hdf5"]


def test_a_value_that_no_flow_has_stops_only_its_trajectory(cutouts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fill values without an attribute, as 1e20, are found before the file gets its name."""
    velocity, pressure = flow(0)
    pressure[2, 0, 0, 0] = 1e20
    write_cutout(cutouts / "filled.h5", velocity, pressure, even_points())
    mapping = mapping_file(cutouts, files={"train": ["filled.h5", "train.h5"], "valid": ["valid.h5"]}, output="out")
    assert main(["data", "import", str(mapping)]) == 2
    assert "filled.h5: pressure of snapshot 2 (Velocity_0003) has values up to 1e+20" in capsys.readouterr().err
    assert not list(cutouts.rglob("out/data/train/*"))
    assert main(["data", "import", str(mapping), "--skip-bad"]) == 0
    assert "left out: box_0000.hdf5: filled.h5: pressure of snapshot 2" in capsys.readouterr().out
    assert [record.path.name for record in list_trajectories(cutouts / "out", "train")] == ["box_0001.hdf5"]
    assert FieldStats.load(cutouts / "out").velocity_rms == pytest.approx(1, rel=0.05)


def test_other_domains_in_the_folder_are_kept_and_counted(cutouts: Path) -> None:
    imported(cutouts)
    out = imported(cutouts, domain="second", scale={"velocity": 3.0})
    assert [record.domain for record in list_trajectories(out, "train")] == ["box", "second"]
    assert FieldStats.load(out).velocity_rms == pytest.approx(5**0.5, rel=0.05)
    with pytest.raises(UserError, match="1 trajectories of second that this mapping does not name"):
        imported(cutouts, domain="second", files={"train": ["train.h5"], "valid": ["valid.h5"]})
    write_cutout(cutouts / "train.h5", *flow(0, grid=(8, 8, 8)), even_points((8, 8, 8)))
    with pytest.raises(UserError, match=r"gives the grid \[8, 8, 8\], the dataset has \[8, 16, 24\]"):
        imported(cutouts, domain="second")
