"""Families of regimes: coordinates, complete files, resumed generation, and refused settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import data
from shodh_moe.ccm.family import FAMILIES, SPLITS, Family, initial_states
from shodh_moe.solvers import trajectory_seed
from shodh_moe.solvers.planar.reaction_diffusion import ReactionDiffusion

TINY = replace(
    FAMILIES["reaction_diffusion"],
    settings=ReactionDiffusion(initial_modes=6, initial_length=0.5),
    grid=8,
    snapshots=3,
    coordinates={"support": (-1.0, 0.0), "ood_high": (1.5,)},
    trajectories={"support": 3, "ood_high": 2},
)


def quiet(items: Iterable[Any], *_: object) -> Iterator[Any]:
    return iter(items)


def counted(family: Family, folder: Path) -> int:
    """Count the files that one call generates."""
    made: list[Any] = []

    def progress(items: Iterable[Any], *_: object) -> Iterator[Any]:
        for item in items:
            made.append(item)
            yield item

    data.generate(family, folder, progress)
    return len(made)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_families_have_endpoints_at_one_and_their_other_regimes_apart(name: str) -> None:
    family = FAMILIES[name]
    assert family.value(-1) == pytest.approx(family.low)
    assert family.value(1) == pytest.approx(family.high)
    for s in (-1.5, -0.3, 0.0, 1.35):
        assert family.coordinate(family.value(s)) == pytest.approx(s, abs=1e-12)
    places = family.coordinates
    assert set(places) == set(family.trajectories) == set(SPLITS)
    assert places["endpoint_low"] == (-1.0,)
    assert places["endpoint_high"] == (1.0,)
    assert max(places["ood_low"]) < min(places["validation"]) < -1 < 1 < max(places["validation"])
    assert max(places["validation"]) < min(places["ood_high"])
    # Test regimes are never used for training or tuning.
    tested = {*places["interpolation"], *places["ood_low"], *places["ood_high"]}
    assert not tested & {*places["support"], *places["validation"], -1.0, 1.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_generated_and_read_back(name: str, tmp_path: Path) -> None:
    family = replace(FAMILIES[name], grid=40, snapshots=3, coordinates={"validation": (-1.2, 1.2)})
    family = replace(family, trajectories={"validation": 2})
    assert data.generate(family, tmp_path, quiet) == tmp_path / name
    low, high = data.read_split(family, tmp_path, "validation")
    assert low.fields.shape == high.fields.shape == (2, 3, len(family.channels), 40, 40)
    assert low.fields.dtype == torch.float32
    assert (low.coordinate, high.coordinate) == (-1.2, 1.2)
    assert low.value == pytest.approx(family.value(-1.2))
    assert low.interval == family.interval
    assert low.channels == family.channels
    # Four separate trajectories.
    firsts = [*low.fields[:, 0, 0], *high.fields[:, 0, 0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    with h5py.File(tmp_path / name / "validation" / "s+1.200.hdf5") as file:
        assert file.attrs["units"] == "dimensionless"
        assert file.attrs["seed"] == 0
        assert len(file.attrs["request_hash"]) == 64
        np.testing.assert_allclose(file["t-coordinate"][()], np.arange(3) * family.interval, rtol=1e-6)
        assert file["x-coordinate"].shape == file["y-coordinate"].shape == (40,)


def test_only_missing_damaged_or_outdated_files_are_generated(tmp_path: Path) -> None:
    assert counted(TINY, tmp_path) == 3
    assert counted(TINY, tmp_path) == 0
    first, second, _ = (regime.path for regime in data.regimes(TINY, tmp_path))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    second.unlink()
    assert counted(TINY, tmp_path) == 2
    assert counted(replace(TINY, seed=1), tmp_path) == 3
    assert counted(replace(TINY, trajectories={"support": 3, "ood_high": 1}, seed=1), tmp_path) == 1


def test_a_failed_run_keeps_complete_files(tmp_path: Path) -> None:
    def stop(items: Iterable[Any], *_: object) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        data.generate(TINY, tmp_path, stop)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"s-1.000.hdf5", "s+0.000.hdf5"}
    assert counted(TINY, tmp_path) == 3 - len(files)


def test_trajectories_do_not_depend_on_other_trajectories(tmp_path: Path) -> None:
    data.generate(TINY, tmp_path / "a", quiet)
    more = replace(TINY, trajectories={"support": 20}, coordinates={"support": (0.5, 0.0)})
    data.generate(more, tmp_path / "b", quiet)
    few, many = (data.read(tmp_path / folder / TINY.name / "support" / "s+0.000.hdf5") for folder in "ab")
    torch.testing.assert_close(few.fields, many.fields[:3], rtol=0, atol=0)
    part = data.read(tmp_path / "b" / TINY.name / "support" / "s+0.000.hdf5", 1, 3)
    torch.testing.assert_close(part.fields, few.fields[1:], rtol=0, atol=0)


def test_gravity_can_be_the_parameter_of_shallow_water() -> None:
    family = FAMILIES["shallow_water"]
    fields, gravity = initial_states(family, [trajectory_seed(0, "g", 0)], family.value(1.0))
    assert gravity.tolist() == pytest.approx([2.5])
    assert float(fields[:, 0].max()) == family.fixed_dam_height


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s-1\.000\.hdf5 does not exist: generate"):
        data.read_split(TINY, tmp_path, "support")
    data.generate(TINY, tmp_path, quiet)
    path = data.regimes(TINY, tmp_path)[0].path
    with pytest.raises(UserError, match="other settings"):
        data.read_split(replace(TINY, interval=0.5), tmp_path, "support")
    with pytest.raises(UserError, match="no regimes in split 'validation'"):
        data.read_split(TINY, tmp_path, "validation")
    with h5py.File(path, "r+") as file:
        file["tensor"][0, 1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        data.read(path)
    with h5py.File(path, "r+") as file:
        del file.attrs["coordinate"]
    with pytest.raises(UserError, match="not a complete file"):
        data.read(path)
    path.write_text("text")
    with pytest.raises(UserError, match="cannot be read"):
        data.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter": "viscosity"}, "no parameter 'viscosity': give diffusivity"),
        ({"low": 6e-3, "high": 6e-3}, "low < high"),
        ({"coordinates": {"suport": (0.0,)}}, "unknown split 'suport'"),
        ({"coordinates": {"support": (0.5, 0.50001)}}, "are equal to three decimals"),
        ({"scale": "linear", "coordinates": {"support": (-3.0,)}}, "is -0.002 at s = -3"),
        ({"trajectories": {}}, "needs a positive number for split support"),
        ({"interval": 0.0}, "positive interval"),
    ],
)
def test_invalid_families_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        data.generate(replace(TINY, **changes), tmp_path, quiet)


def test_a_diverged_solution_names_family_regime_and_trajectory(tmp_path: Path) -> None:
    wild = replace(TINY, settings=ReactionDiffusion(initial_modes=6, initial_length=0.5, step=1.0), interval=1.0)
    with pytest.raises(UserError, match=r"reaction_diffusion at diffusivity 0\.002 .* trajectory \d of 3"):
        data.generate(wild, tmp_path, quiet)
    assert not list(tmp_path.rglob("*.hdf5"))
