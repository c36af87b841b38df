"""Importing from grids that are stored backwards, staggered, thin, or with missing values as land."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shodh_moe.data import list_trajectories, read_provenance, read_trajectory
from tests.data.test_import import GRID, cutouts, flow, imported, mapping_file  # noqa: F401  (a fixture)
from tests.tiny import refused

TIMES: dict[str, Any] = {"files": {"train": ["flow.h5"]}, "axes": ["t", "x", "y", "z"], "velocity": list("uvw")}
POINTS: dict[str, Any] = {"spacing": None, "coordinates": {axis: axis for axis in "xyz"}}
OPEN = {"x": "open", "y": "open", "z": "open"}


def write_fields(folder: Path, velocity: np.ndarray, pressure: np.ndarray, **others: np.ndarray) -> None:
    """Write the flow as u, v, w and p [T, X, Y, Z], and other arrays."""
    with h5py.File(folder / "flow.h5", "w") as file:
        for name, values in {**dict(zip("uvw", velocity.swapaxes(0, 1), strict=True)), "p": pressure, **others}.items():
            file[name] = values


@pytest.mark.parametrize("resample", [None, {"method": "cubic", "spacing": 0.5}])
def test_axes_with_decreasing_coordinates_are_reversed(cutouts: Path, resample: dict[str, Any] | None) -> None:  # noqa: F811
    velocity, pressure = flow(0)
    points = {axis: 3 + 0.5 * np.arange(size) for axis, size in zip("xyz", GRID, strict=True)}
    mask = np.zeros(GRID)
    mask[1, 2, 20:] = 1
    stored = {"x": points["x"], "y": points["y"][::-1], "z": points["z"][::-1], "mask": mask[:, ::-1, ::-1]}
    changes = {**TIMES, **POINTS, "pressure": "p", "mask": {"dataset": "mask"}, "resample": resample}
    # The periodic axes and the crop keep their meaning: a crop counts the points of the file.
    changes |= {"boundaries": {"x": "periodic", "y": "periodic", "z": ["wall", "open"]}, "crop": {"z": [0, 16]}}
    if resample:
        changes |= {"boundaries": dict.fromkeys("xyz", "periodic"), "crop": None}
    write_fields(cutouts, velocity[..., ::-1, ::-1], pressure[..., ::-1, ::-1], **stored)
    out = imported(cutouts, **changes)
    trajectory = read_trajectory(list_trajectories(out, "train")[0])
    kept = slice(None) if resample else slice(8, 24)
    fluid = 1 - mask[..., kept]
    np.testing.assert_allclose(trajectory.velocity_T3XYZ, velocity[..., kept] * fluid, atol=1e-6)
    np.testing.assert_allclose(trajectory.pressure_T1XYZ[:, 0], pressure[..., kept] * fluid, atol=1e-6)
    np.testing.assert_array_equal(trajectory.solid_1XYZ[0], mask[..., kept])
    assert read_provenance(trajectory.record.path)["origin"] == [3, 3, 3 if resample else 7]


def test_components_on_faces_are_averaged_to_the_centres(cutouts: Path) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    faces = [rng.standard_normal((3, *[n + (a == b) for b, n in enumerate(GRID)])) for a in range(3)]
    pressure = rng.standard_normal((3, *GRID))
    with h5py.File(cutouts / "flow.h5", "w") as file:
        for name, values in zip("uvwp", [*faces, pressure], strict=True):
            file[name] = values
    out = imported(
        cutouts, **TIMES, staggered=True, pressure="p", boundaries={**OPEN, "x": "wall"}, crop={"z": [5, 13]}
    )
    stored = read_trajectory(list_trajectories(out, "train")[0])
    centres = [(np.delete(f, 0, 1 + a) + np.delete(f, -1, 1 + a)) / 2 for a, f in enumerate(faces)]
    np.testing.assert_allclose(stored.velocity_T3XYZ, np.stack(centres, 1)[..., 5:13], atol=1e-6)
    np.testing.assert_allclose(stored.pressure_T1XYZ[:, 0], pressure[..., 5:13], atol=1e-6)


def test_staggered_components_are_recognised(cutouts: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with h5py.File(cutouts / "flow.h5", "w") as file:
        for axis, name in enumerate("uvw"):
            file[name] = np.zeros((3, *[n + (a == axis) for a, n in enumerate(GRID)]))
        file["p"] = np.zeros((3, *GRID))
    mapping = mapping_file(cutouts, **TIMES, pressure="p")
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=("flow.h5: v has", "`staggered: true`"))


@pytest.mark.parametrize(
    ("mask", "land"),
    [
        ({"dataset": "u", "solid": "missing"}, ["missing"]),
        ({"dataset": "sea", "solid": "missing"}, ["missing"]),
        ({"dataset": "sea", "solid": "both", "inverted": True}, ["missing", "zero"]),
    ],
)
@pytest.mark.parametrize("resample", [None, {"method": "cubic", "spacing": 0.5}])
def test_missing_values_are_land(
    cutouts: Path,  # noqa: F811
    mask: dict[str, Any],
    land: list[str],
    resample: dict[str, Any] | None,
) -> None:
    velocity, pressure = flow(1)
    areas = {"missing": np.s_[2:5, 3:6, 4:9], "zero": np.s_[6, 7, 8]}
    sea, solid = np.ones(GRID), np.zeros(GRID)
    sea[areas["missing"]], sea[areas["zero"]] = np.nan, 0
    for name in land:
        solid[areas[name]] = 1
    stored = [np.where(solid, np.nan, values) for values in (velocity, pressure)]
    write_fields(cutouts, *stored, sea=sea)
    out = imported(cutouts, **TIMES, pressure="p", mask=mask, resample=resample)
    trajectory = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(trajectory.solid_1XYZ[0], solid)
    np.testing.assert_allclose(trajectory.velocity_T3XYZ, np.where(solid, 0, velocity), atol=1e-6)


def write_thin(folder: Path, size: int) -> None:
    velocity, pressure = (values[..., :size] for values in flow(0))
    points = {axis: 0.5 * np.arange(n) for axis, n in zip("xyz", velocity.shape[2:], strict=True)}
    sea = np.where(np.arange(size) == 0, np.nan, np.ones((*GRID[:2], size)))
    write_fields(folder, velocity, pressure, sea=sea, **points)


@pytest.mark.parametrize(
    ("size", "changes", "messages"),
    [
        (3, {"crop": "auto", "boundaries": OPEN}, ("3 cells along z", "8 or more", "at most 0.38 times this one")),
        (1, {}, ("1 point along z", "3D flows, not 2D")),
        (8, {"mask": {"dataset": "sea"}}, ("the mask sea has 128 values that are missing", "mask.solid to missing")),
    ],
)
def test_the_remedy_is_the_true_one(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    size: int,
    changes: dict[str, Any],
    messages: tuple[str, ...],
) -> None:
    write_thin(cutouts, size)
    mapping = mapping_file(cutouts, **TIMES, **POINTS, pressure="p", **changes)
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=messages)
    if size == 3:  # the remedy works
        write_thin(cutouts, 3)
        resample = {"method": "linear", "spacing": 0.5 * 0.375}
        boundaries = {"x": "open", "y": "open", "z": "periodic"}
        out = imported(cutouts, **TIMES, **POINTS, pressure="p", resample=resample, crop="auto", boundaries=boundaries)
        assert list_trajectories(out, "train")[0].grid == (16, 40, 8)
