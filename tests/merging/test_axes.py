"""Several axes: the layout that models form, and merges compared with the plain formulas."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.merging import merge
from shodh_moe.merging.axes import alpha_at, find_layout
from tests.merging.models import State, bits, config, load, merged, network, same_bits, save

BOX = {"dry": (0.001, 2), "thick": (0.004, 2), "heavy": (0.001, 7), "both": (0.004, 7)}  # viscosity, gravity
STAR = {"thin": (0.001, 3), "thick": (0.004, 3), "light": (0.002, 2), "heavy": (0.002, 7)}


def point(viscosity: float, gravity: float) -> dict[str, float]:
    return {"viscosity": viscosity, "gravity": gravity}


def experts(places: dict[str, tuple[float, float]]) -> tuple[list[Any], dict[str, State]]:
    """Save models beside base.safetensors in the current folder; return them with coordinates, and all tensors."""
    base = network()
    save(base, Path("base.safetensors"))
    states = {name: network(i + 1, near=base) for i, name in enumerate(places)}
    entries = [
        (save(states[name], Path(f"{name}.safetensors")), {"coordinate": point(*places[name])}) for name in places
    ]
    return entries, {"base": base, **states}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def wide(states: dict[str, State], tensor: str) -> dict[str, Tensor]:
    return {name: state[tensor].double() for name, state in states.items()}


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.3, -0.8), (-1.4, 1.2)])
def test_corners_are_interpolated_multilinearly(alphas: tuple[float, float]) -> None:
    entries, states = experts(BOX)
    v, g = alphas
    made = merged(Path(), "ccm", entries, parameters={"alpha": point(v, g)})
    for name in ("lift.weight", "double"):
        x = wide(states, name)
        low = (1 - v) / 2 * x["dry"] + (1 + v) / 2 * x["thick"]
        high = (1 - v) / 2 * x["heavy"] + (1 + v) / 2 * x["both"]
        expected = (1 - g) / 2 * low + (1 + g) / 2 * high
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [-1.4, 0.1, 1.3])
@pytest.mark.parametrize("models", [2, 3])
def test_what_all_models_have_in_common_stays_bit_for_bit(alpha: float, models: int) -> None:
    base = network()
    entries = []
    for number in range(models):
        own = {name: values.clone() for name, values in base.items()}
        for name in ("lift.weight", "double"):
            own[name].view(-1)[::3] += 0.1 * (number + 1)
        entries.append((save(own, Path(f"{number}.safetensors")), {"coordinate": float(number)}))
    made = merged(Path(), "ccm", entries, parameters={"alpha": alpha})
    for name in ("lift.weight", "double"):
        common, moved = (torch.arange(base[name].numel()) % 3 != 0), made[name].view(-1)
        assert torch.equal(moved[common], base[name].view(-1)[common])
        assert not torch.equal(moved, base[name].view(-1))
    for name, values in base.items():
        if name not in ("lift.weight", "double"):
            assert bits(made[name]) == bits(values), name


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.3, -0.8), (-1.4, 1.2)])
def test_a_star_is_the_base_plus_a_step_along_each_axis(alphas: tuple[float, float]) -> None:
    entries, states = experts(STAR)
    v, g = alphas
    made = merged(Path(), "ccm", entries, base_model="base.safetensors", parameters={"alpha": point(v, g)})
    for name in ("lift.weight", "double"):
        x = wide(states, name)
        d = {key: value - x["base"] for key, value in x.items()}
        along_v = (d["thin"] + d["thick"]) / 2 + v * (d["thick"] - d["thin"]) / 2
        along_g = (d["light"] + d["heavy"]) / 2 + g * (d["heavy"] - d["light"]) / 2
        torch.testing.assert_close(made[name].double(), x["base"] + along_v + along_g, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power", [1, 0.5, 0])
def test_a_corner_is_reproduced_bit_for_bit_at_its_coordinate(power: float) -> None:
    entries, states = experts(BOX)
    sweep = [{"name": name, "parameters": {"coordinate": point(*BOX[name])}} for name in BOX]
    merge(config(Path(), "ccm", entries, parameters={"power": power}, sweep=sweep, output="out"))
    assert all(same_bits(load(Path("out", name)), states[name]) for name in BOX)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_alpha_is_exact_at_the_ends(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if low < high:
        assert (alpha_at(low, low, high), alpha_at(high, low, high)) == (-1, 1)
        assert abs(alpha_at(low / 2 + high / 2, low, high)) <= 1


def test_alpha_of_a_power() -> None:
    assert math.isclose(alpha_at(4, 1, 9, power=0.5), 0, abs_tol=1e-12)
    assert math.isclose(alpha_at(16, 1, 9, power=0.5), 2)


def test_alpha_of_logarithms() -> None:
    assert alpha_at(2, 1, 3) == 0
    assert math.isclose(alpha_at(1e-4, 1e-6, 1e-2, power=0), 0, abs_tol=1e-12)
    assert math.isclose(alpha_at(1.0, 1e-6, 1e-2, power=0), 2)


def test_three_axes_and_their_means() -> None:
    names = ("a", "b", "c")
    corners = list(itertools.product((0.0, 1.0), repeat=3))
    box = find_layout({f"{i}": dict(zip(names, corner, strict=True)) for i, corner in enumerate(corners)}, "")
    assert box.kind == "corners"
    assert box.coefficients([0.0] * 3) == [0.0, *[1 / 8] * 8]
    alphas = [0.5, -0.2, 1.3]
    signed = [[(1 - a) / 2, (1 + a) / 2] for a in alphas]
    expected = [x * y * z for x, y, z in itertools.product(*signed)]
    assert [box.models, box.coefficients(alphas)[1:]] == [tuple("01234567"), pytest.approx(expected)]
    middles = dict.fromkeys(names, 0.5)
    star = find_layout({f"{name}{end}": {**middles, name: end} for name in names for end in (0.0, 1.0)}, "")
    assert star.kind == "star"
    assert star.coefficients([0.0] * 3) == [-2.0, *[0.5] * 6]
    found = dict(zip(star.models, star.coefficients(alphas)[1:], strict=True))
    low, high = ([(1 + sign * a) / 2 for a in alphas] for sign in (-1, 1))
    assert [found[f"{name}0.0"] for name in names] == low
    assert [found[f"{name}1.0"] for name in names] == high
    assert math.isclose(sum(star.coefficients(alphas)), 1)


@pytest.mark.parametrize("places", [BOX, STAR])
def test_the_order_of_models_and_axes_does_not_change_a_bit(places: dict[str, tuple[float, float]]) -> None:
    entries, _ = experts(places)
    parameters = {"coordinate": point(0.0035, 6), "power": {"viscosity": 0}}
    words: dict[str, Any] = {"base_model": "base.safetensors", "parameters": parameters}
    first = merged(Path(), "ccm", entries, **words)
    turned = [(path, {"coordinate": dict(reversed(one["coordinate"].items()))}) for path, one in reversed(entries)]
    again = merged(Path(), "ccm", turned, output="turned", **words)
    assert same_bits(first, again)


def test_filters_for_one_axis() -> None:
    entries, states = experts(BOX)
    alpha = {"viscosity": [{"filter": "lift", "value": 1}, {"value": -1}], "gravity": 1}
    made = merged(Path(), "ccm", entries, parameters={"alpha": alpha})
    assert bits(made["lift.weight"]) == bits(states["both"]["lift.weight"])
    assert bits(made["double"]) == bits(states["heavy"]["double"])
    assert json.loads(Path("out/merge.json").read_text())["alpha"]["value"] == {"viscosity": None, "gravity": 1}
    alpha["viscosity"] = [{"filter": "lft", "value": 1}, {"value": -1}]
    with pytest.raises(UserError, match="'lft' matches none"):
        merge(config(Path(), "ccm", entries, parameters={"alpha": alpha}), Path("not"))


def test_a_single_axis_may_be_named() -> None:
    entries, states = experts(BOX)
    line = [(path, {"coordinate": {"viscosity": value}}) for (path, _), value in zip(entries, (3, 1), strict=False)]
    merge(config(Path(), "ccm", line, sweep={"alpha": [-1, 0.5]}, output="grid"))
    assert same_bits(load(Path("grid/alpha=-1")), states["thick"])
    merge(config(Path(), "ccm", line, sweep={"coordinate": [2.5]}, output="places"))
    assert bits(load(Path("places/coordinate=2.5"))["double"]) == bits(load(Path("grid/alpha=0.5"))["double"])
    manifest = json.loads(Path("places/coordinate=2.5/merge.json").read_text())
    assert (manifest["alpha"]["layout"], manifest["alpha"]["value"]) == ("line", {"viscosity": 0.5})


def test_three_models_on_an_axis_are_points_of_a_parabola() -> None:
    places = {"low": (1.0, 0.0), "between": (2.0, 0.0), "high": (4.0, 0.0)}
    entries, states = experts(places)
    models = [(path, {"coordinate": places[Path(path).stem][0]}) for path, _ in entries]

    def at(**parameters: Any) -> State:
        merge(config(Path(), "ccm", models, parameters=parameters), Path(f"out-{len(list(Path().glob('out-*')))}"))
        return load(Path(f"out-{len(list(Path().glob('out-*'))) - 1}"))

    for name, (value, _) in places.items():
        for power in (1, 0, 0.5):
            made = at(coordinate=value, power=power)
            if name == "between" and power != 0:  # in the middle of the logarithms, its alpha is 0
                torch.testing.assert_close(made["double"], states[name]["double"], rtol=1e-12, atol=1e-12)
            else:
                assert same_bits(made, states[name])
    # Lagrange's formula through -1, -1/3 and 1.
    low, between, high = (states[name]["double"] for name in places)
    a, t = 1.5, -1 / 3
    expected = (
        low * (a - t) * (a - 1) / ((-1 - t) * -2)
        + between * (a + 1) * (a - 1) / ((t + 1) * (t - 1))
        + high * (a + 1) * (a - t) / (2 * (1 - t))
    )
    torch.testing.assert_close(at(alpha=a)["double"], expected, rtol=1e-12, atol=1e-12)
    manifest = json.loads(Path("out-0/merge.json").read_text())
    roles = {Path(path).stem: one["role"] for path, one in manifest["inputs"].items()}
    assert roles == {"low": "low", "between": "between", "high": "high"}
    with pytest.raises(UserError, match="power 9 is outside"):
        at(alpha=0.5, power=9)


def test_the_manifest_lists_alpha_by_axis(capsys: pytest.CaptureFixture[str]) -> None:
    entries, _ = experts(STAR)
    parameters = {"coordinate": point(0.004, 12), "gamma": {"gravity": 0.5}, "clip": {"gravity": 1.25}}
    path = config(Path(), "ccm", entries, base_model="base.safetensors", parameters=parameters)
    merge(path, Path("out"))
    warning = "gravity 12 is far outside 2 to 7: alpha 1.5 is clipped to 1.25"
    assert f"warning: out: {warning}" in capsys.readouterr().err
    manifest = json.loads(Path("out/merge.json").read_text())
    assert manifest["alpha"] == {
        "found": "scale",
        "layout": "star",
        "value": point(1.0, 1.25),
        "unclipped": point(1.0, 1.5),
        "coordinate": point(0.004, 12.0),
        "low": point(0.001, 2.0),
        "high": point(0.004, 7.0),
        "clip": point(1.5, 1.25),
        "gamma": point(1.0, 0.5),
    }
    assert manifest["notes"][0] == warning
    roles = {path: one["role"] for path, one in manifest["inputs"].items()}
    assert roles["base.safetensors"] == "base"
    assert (roles["thin.safetensors"], roles["heavy.safetensors"]) == ("viscosity=low", "gravity=high")
    assert len(manifest["relative_distance_from_base"]) == 4
    merge(path, Path("out"))  # the same plan
    assert "exists already" in capsys.readouterr().out
    parameters["gamma"] = {"gravity": 0.4}
    with pytest.raises(UserError, match="is not this merge"):
        merge(config(Path(), "ccm", entries, base_model="base.safetensors", parameters=parameters), Path("out"))


def test_a_corner_trained_from_another_anchor_is_refused() -> None:
    entries, _ = experts(BOX)
    save(network(77), Path("both.safetensors"))
    path = config(Path(), "ccm", entries, base_model="base.safetensors", parameters={"alpha": point(0, 0)})
    message = r"^both.safetensors differs from base.safetensors by 1\..* it was not trained from it"
    with pytest.raises(UserError, match=message):
        merge(path, Path("out"))


def without(places: dict[str, tuple[float, float]], name: str) -> dict[str, dict[str, float]]:
    return {key: point(*value) for key, value in places.items() if key != name}


@pytest.mark.parametrize(
    ("points", "messages"),
    [
        (without(BOX, "heavy"), ("no model is at the corner gravity=7, viscosity=0.001", "add it")),
        ({**without(BOX, "heavy"), "heavy": point(0.0011, 7)}, ("viscosity is 0.001 in dry; 0.0011 in heavy",)),
        ({**without(BOX, ""), "more": point(0.001, 2)}, ("dry and more have the same coordinate gravity=2",)),
        ({**without(BOX, "dry"), "dry": {"viscosity": 1}}, ("dry has axes viscosity", "thick has axes gravity, visc")),
        ({**without(BOX, "dry"), "dry": {"viscosity": 1, "gravty": 1}}, ("axes gravty, viscosity", "same axes")),
        ({**without(BOX, "dry"), "dry": {"": 1}}, ("dry has a plain number",)),
        (without({"a": (1, 2), "b": (3, 2)}, ""), ("all models have gravity=2", "leave this axis out")),
        (without(STAR, "heavy"), ("viscosity is 0.001 in thin; 0.002 in light; 0.004 in thick",)),
        ({**without(STAR, ""), "corner": point(0.001, 7)}, ("corner", "at an end of viscosity and of gravity")),
        ({**without(STAR, ""), "centre": point(0.002, 3)}, ("centre", "as base_model is")),
        ({"a": {"": 1}, "b": {"": 2}, "c": {"": 4}, "d": {"": 5}}, ("4 models lie on one axis", "2 in b")),
        ({"a": {"": 1}, "b": {"": 1}}, ("a and b have the same coordinate 1",)),
    ],
)
def test_points_that_form_no_layout_are_refused(points: dict[str, dict[str, float]], messages: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        find_layout(points, "out")
    assert str(caught.value).startswith("out: ")
    for text in messages:
        assert text in str(caught.value).replace("gravity and of viscosity", "viscosity and of gravity")
