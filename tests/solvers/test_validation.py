"""The properties tabulated in docs/validation.md, on small grids."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shodh_moe.solvers import exact

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def flows() -> Iterator[ModuleType]:
    """The flows behind the tables, benchmarks/studies/lattice_flows.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("studies.lattice_flows")


def orders(errors: list[float], ratio: float = 2.0) -> list[float]:
    return [math.log(a / b, ratio) for a, b in pairwise(errors)]


@pytest.mark.parametrize("study", ["oblique", "startup", "swinging_film"])
def test_walls_are_second_order_accurate(flows: ModuleType, study: str) -> None:
    runs = {
        "oblique": lambda gap: flows.oblique(gap, 1, 0.5),
        "startup": lambda gap: flows.startup(gap, 0.1),
        "swinging_film": lambda gap: flows.swinging_film(gap, 0.2, 4.0),
    }
    errors = [flows.relative(*runs[study](gap)) for gap in (4, 8, 16)]
    assert errors[-1] < 3e-3
    assert min(orders(errors)) > 1.9


def test_a_staircase_wall_is_first_order_accurate(flows: ModuleType) -> None:
    errors = [flows.relative(*flows.oblique(gap, 2, 0.5)) for gap in (4, 8, 16)]
    assert orders(errors) == pytest.approx([1, 1], abs=0.15)


def test_another_magic_parameter_moves_the_wall(flows: ModuleType) -> None:
    found, expected = flows.straight(8, 0.5, flows.MAGIC)
    assert abs(flows.wall_offset(found)) < 1e-9
    assert flows.relative(found, expected) < 1e-9
    single, expected = flows.straight(8, 0.5, flows.bgk(0.5))
    assert flows.wall_offset(single) == pytest.approx(0.33, abs=0.02)


def test_exact_friction_of_open_channels() -> None:
    # Shah and London's values for ducts of sides 1:1, 1:2 (standing and lying), and for plates.
    known = {2.0: 14.22708, 1.0: 15.54806, 4.0: 15.54806, 1e6: 24.0}
    assert {width: exact.channel_friction(width) for width in known} == pytest.approx(known, rel=5e-6)


def test_open_channel_with_side_walls_has_the_published_friction(flows: ModuleType) -> None:
    errors = [abs(flows.open_channel_friction(depth, 2)[0] / exact.channel_friction(2) - 1) for depth in (4, 8)]
    assert errors[-1] < 4e-3
    assert orders(errors)[0] > 1.85


@pytest.mark.parametrize("start", [exact.taylor_green, exact.beltrami])
def test_measured_viscosity_converges_to_the_nominal_one_at_second_order(flows: ModuleType, start: object) -> None:
    waves = 2 if start is exact.taylor_green else 1
    errors = []
    for n in (8, 16, 32) if waves == 2 else (8, 16):
        rate = waves * 0.05 * (2 * math.pi / n) ** 2
        errors.append(abs(flows.decay(start(n, 0.16 / n), 0.05, rate, 0.5)[0]))  # type: ignore[operator]
    assert errors[-1] < 0.01
    assert min(orders(errors)) > 1.8


def test_error_of_the_mach_number_is_quadratic(flows: ModuleType) -> None:
    n, errors = 64, []
    for speed in (0.08, 0.16):
        viscosity = speed * n / 100
        rate = 2 * viscosity * (2 * math.pi / n) ** 2
        errors.append(flows.decay(exact.taylor_green(n, speed), viscosity, rate, 0.5)[1])
    assert orders(errors, 0.5) == pytest.approx([2.2], abs=0.4)


@pytest.mark.parametrize("fraction", [0.125, 0.216, 0.343, 0.45])
def test_drag_of_a_sphere_array_equals_the_published_value(flows: ModuleType, fraction: float) -> None:
    through, _ = flows.permeability(flows.sphere(24, fraction), 1.0)
    assert flows.drag(through, fraction) == pytest.approx(exact.ZICK_HOMSY[fraction], rel=0.05)


def test_permeability_does_not_depend_on_viscosity(flows: ModuleType) -> None:
    solid_XYZ = flows.sphere(12, 0.343)
    found = [flows.permeability(solid_XYZ, viscosity)[0] for viscosity in (0.05, 0.3, 1.5)]
    np.testing.assert_allclose(found, found[0], rtol=3e-4)
    assert flows.permeability(solid_XYZ, 1.5, flows.bgk(1.5))[0] > 1.5 * found[0]
