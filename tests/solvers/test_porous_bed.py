"""The porous bed: its geometry, and the flow over and through it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.config import Config
from shodh_moe.data import generate, read_provenance
from shodh_moe.solvers import Simulation, simulate
from shodh_moe.solvers.domains import PorousBed
from shodh_moe.solvers.domains.porous_bed import SLIP, sphere_bed
from shodh_moe.solvers.geometry import connected_pores, dense_layers, percolating

GRID = (32, 32, 32)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """The measurements behind the tables, benchmarks/studies/porous_bed.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("studies.porous_bed")


@pytest.fixture(scope="module")
def steady(study: ModuleType) -> Any:
    """Steady creeping flow through a tall bed on a small grid."""
    config = PorousBed(height=[0.6, 0.6], porosity=[0.7, 0.7], grain=2.5)
    return study.steady_bed(config, 0, (20, 20, 28))


@pytest.fixture(scope="module")
def unsteady() -> Simulation:
    return simulate("porous_bed", PorousBed(), GRID, 0, 3, 16)


@pytest.mark.parametrize("porosity", [[0.6, 0.85], [0.5, 0.5], [0.95, 0.95]])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_bed_keeps_its_height_and_porosity_and_lets_flow_through(porosity: list[float], seed: int) -> None:
    grid = (24, 20, 32)
    solid_XYZ, height, drawn = sphere_bed(grid, PorousBed(porosity=porosity), np.random.default_rng(seed))
    assert 0.35 * 31 - 0.5 <= height <= 0.55 * 31 + 0.5
    assert solid_XYZ[:, :, 0].all()
    assert solid_XYZ[:, :, 1 : height + 1].any()
    assert not solid_XYZ[:, :, height + 1 :].any(), "no sphere rises above the bed's height"
    dense = dense_layers(height, 3.0)
    assert 0.9 * porosity[0] <= drawn["porosity"] <= porosity[1] + 0.01
    assert drawn["porosity"] == pytest.approx(1 - solid_XYZ[:, :, 1 : dense + 1].mean())
    assert len(np.unique(connected_pores(solid_XYZ))) == 2, "every pore is open to the stream"
    assert percolating(solid_XYZ[:, :, : dense + 1]) is not None, "flow also passes below the top"


def test_the_bed_is_uniform_below_and_looser_at_its_top() -> None:
    config = PorousBed(height=[0.55, 0.55], porosity=[0.7, 0.7])
    beds = [sphere_bed(GRID, config, np.random.default_rng(seed))[0] for seed in range(12)]
    porosity_Z = 1 - np.mean(beds, axis=(0, 1, 2))[1:18]
    assert dense_layers(17, 3.0) == 11
    assert porosity_Z[:11] == pytest.approx(0.7, abs=0.05)
    assert (np.diff(porosity_Z[11:]) > 0).all()
    assert porosity_Z[-1] > 0.9


def test_the_body_force_equals_the_drag_of_bed_and_floor(steady: Any) -> None:
    total = steady.force * (~steady.solid_XYZ).sum()
    assert steady.drag_Z.sum() == pytest.approx(total, rel=1e-4)
    assert not steady.drag_Z[steady.height + 1 :].any()
    assert 0 < steady.drag_Z[0] < 0.1 * total, "the spheres carry nearly all of it"
    # Above the crests the layers' mean obeys nu u'' = -force, and the lid carries no stress.
    stream_Z = steady.profile_Z[steady.height + 1 :]
    curvature = -steady.force / steady.viscosity
    np.testing.assert_allclose(np.diff(stream_Z, 2), curvature, rtol=1e-3)
    assert stream_Z[-1] - stream_Z[-2] == pytest.approx(-curvature, rel=1e-3)


def test_deep_in_the_bed_the_flow_is_darcy_flow(steady: Any) -> None:
    deep_Z = steady.profile_Z[steady.deep]
    assert deep_Z.std() < 0.3 * steady.darcy
    assert steady.profile_Z[steady.height + 1 :].mean() > 20 * steady.darcy
    across = np.diff(np.log(steady.profile_Z[steady.deep.stop : steady.height + 1]))
    assert (across > 0.1).all(), "the mean rises steeply across the top of the bed"


def test_the_slip_coefficient_is_within_the_range_of_beavers_and_joseph(steady: Any) -> None:
    assert 0.1 < steady.alpha() < 4
    assert 0.1 < steady.alpha(2) < 4, "also with the interface lower by almost a radius"
    assert SLIP / 2 < steady.alpha() < 2 * SLIP, "the constant that sets the mean force"


def test_the_stream_is_fast_and_the_bed_slow(study: ModuleType, unsteady: Simulation) -> None:
    height = unsteady.parameters["bed_height"]
    stream_T = unsteady.velocity_T3XYZ[:, 0, :, :, height + 1 :].mean((1, 2, 3), dtype=np.float64)
    target = unsteady.parameters["target_speed"]
    assert unsteady.parameters["mean_speed"] == pytest.approx(stream_T.mean(), rel=1e-4)
    assert stream_T.mean() == pytest.approx(target, rel=0.25)
    assert np.ptp(stream_T) > 0.1 * target, "the stream pulses"
    darcy_T = np.linalg.norm(study.bed_velocity(unsteady, PorousBed()), axis=1)
    assert 0.01 * target < darcy_T.mean() < 0.15 * target
    assert unsteady.parameters["mach"] < 0.2


def test_a_dataset_stores_the_height_of_each_bed(tmp_path: Path) -> None:
    flow = {"trajectories": {"train": 2, "valid": 1, "test": 1}, "spinup_steps": 5, "grain": 1.5}
    domains = {"open_channel": None, "porous_media": None, "porous_bed": flow}
    config = Config(data={"grid": [16, 16, 16], "snapshots": 2, "domains": domains})
    generate(config.data, tmp_path, lambda items, desc, total: items)
    files = sorted(tmp_path.glob("data/*/*.hdf5"))
    assert len(files) == 4
    for path in files:
        height = read_provenance(path)["parameters"]["bed_height"]
        with h5py.File(path) as file:
            top = int(np.flatnonzero(file["t0_fields/solid"][0].any((0, 1)))[-1])
        assert height - 2 <= top <= height
