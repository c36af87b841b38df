"""The alpha of a ccm target: gamma, logarithms, limits, an alpha found elsewhere, and refused settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.merging import merge
from shodh_moe.merging.config import Target, load_targets
from tests.merging.models import config, load, network, same_bits, save

LINE = {"low": 1, "high": 3}
BOX = {
    "a": {"viscosity": 1, "gravity": 2},
    "b": {"viscosity": 3, "gravity": 2},
    "c": {"viscosity": 1, "gravity": 4},
    "d": {"viscosity": 3, "gravity": 4},
}
STAR = {
    "a": {"viscosity": 1, "gravity": 3},
    "b": {"viscosity": 3, "gravity": 3},
    "c": {"viscosity": 2, "gravity": 2},
    "d": {"viscosity": 2, "gravity": 4},
}
CENTRE = {"viscosity": 2, "gravity": 3}
FOUND = {"found": "prefix", "value": 0.85, "bank": {"0.5": 0.2, "1.0": 0.1}, "frames": 4, "sharpness": 0.3}


def path_of(parameters: dict[str, Any], coordinates: dict[str, Any], **words: Any) -> Path:
    models = [(name, {} if at is None else {"coordinate": at}) for name, at in coordinates.items()]
    return config(Path(), "ccm", models, parameters=parameters, **{"output": "out", **words})


def target(parameters: dict[str, Any], coordinates: dict[str, Any] = LINE, **words: Any) -> Target:
    found = words.pop("found", None)
    [made] = load_targets(path_of(parameters, coordinates, **words), found=found)
    return made


def alpha(parameters: dict[str, Any], coordinates: dict[str, Any] = LINE) -> dict[str, Any]:
    """Return the entry ``alpha`` of the manifest."""
    found = target(parameters, coordinates).alpha
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_gamma_scales_before_clipping() -> None:
    made = target({"coordinate": 3.5, "gamma": 0.8})
    common = {"found": "scale", "coordinate": 3.5, "low": 1.0, "high": 3.0, "clip": 1.5, "gamma": 0.8}
    assert made.alpha == {**common, "value": pytest.approx(1.2), "unclipped": pytest.approx(1.2)}
    assert not made.warnings
    made = target({"coordinate": 3.5, "gamma": 2})
    assert made.alpha == {**common, "gamma": 2.0, "value": 1.5, "unclipped": 3}
    assert "alpha 3 is clipped to 1.5" in made.warnings[0]
    # An explicit gamma of 1 also counts as the readout `scale`.
    assert alpha({"coordinate": 3, "gamma": 1})["found"] == "scale"
    assert alpha({"coordinate": 3})["found"] == "coordinate"


def test_power_0_interpolates_logarithms() -> None:
    ends = {"low": 1e-4, "high": 1e-2}
    middle = alpha({"coordinate": 1e-3, "power": 0}, ends)
    assert (middle["value"], middle["power"]) == (pytest.approx(0, abs=1e-12), 0)
    assert alpha({"coordinate": 10**-1.75, "power": 0}, ends)["value"] == pytest.approx(1.25)
    found = alpha({"coordinate": CENTRE, "power": {"viscosity": 0}, "gamma": {"gravity": 2}}, BOX)
    expected = 2 * math.log(2 / math.sqrt(3)) / math.log(3)
    assert found["value"] == {"viscosity": pytest.approx(expected), "gravity": 0}
    assert found["power"] == {"viscosity": 0, "gravity": 1}


def test_leaving_the_straight_range_of_the_path_warns() -> None:
    text = "alpha 1.4 is beyond +-1.2, the range in which the path was measured to be straight: expect lower accuracy"
    assert target({"alpha": 1.4, "straight": 1.2}).warnings == [text]
    assert target({"alpha": -1.4, "straight": 1.4}).warnings == []
    # A measured straight range replaces the usual guess.
    assert target({"alpha": 2.5, "straight": 3}).warnings == []
    assert len(target({"alpha": [{"filter": "a", "value": 2}, {"value": -1.1}], "straight": 1}).warnings) == 2
    assert target({"coordinate": 9, "straight": 1.5}).warnings == [
        "coordinate 9 is far outside 1 to 3: alpha 7 is clipped to 1.5"
    ]
    by_axis = target({"alpha": {"viscosity": 1.4, "gravity": -1.3}, "straight": {"viscosity": 1.2}}, BOX)
    assert by_axis.warnings == [f"viscosity: {text}"]
    assert len(target({"alpha": {"viscosity": 1.4, "gravity": -1.3}, "straight": 1.2}, BOX).warnings) == 2


def test_gamma_and_coordinate_may_be_combined_with_alpha_in_a_sweep() -> None:
    sweep = [{"name": "given", "parameters": {"alpha": 0.5}}, {"name": "at", "parameters": {"coordinate": 2}}]
    made = load_targets(path_of({"coordinate": 3, "gamma": 0.9}, LINE, sweep=sweep))
    assert [(one.alpha or {})["found"] for one in made] == ["given", "scale"]
    sweep = [{"name": "given", "parameters": {"alpha": CENTRE}}, {"name": "at", "parameters": {"coordinate": CENTRE}}]
    made = load_targets(path_of({"coordinate": CENTRE}, BOX, sweep=sweep))
    assert [(one.alpha or {})["value"] for one in made] == [CENTRE, {"viscosity": 0, "gravity": 0}]


def test_an_alpha_found_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    base = network()
    paths = [save(network(i, near=base), Path(f"{i}.safetensors")) for i in range(2)]
    for i, parameters in enumerate(({}, {"alpha": [{"filter": "lift", "value": 9}]}, {"straight": 0.5})):
        merge(config(Path(), "ccm", paths, parameters=parameters), Path(f"out{i}"), found=FOUND)
        manifest = json.loads(Path(f"out{i}/merge.json").read_text())
        assert manifest["alpha"] == FOUND
        assert "alpha" not in manifest["merge"].get("parameters", {})
    assert "alpha 0.85 is beyond +-0.5" in capsys.readouterr().err
    merge(config(Path(), "ccm", paths, parameters={"alpha": 0.85}), Path("given"))
    assert same_bits(load(Path("out1")), load(Path("given")))
    merge(config(Path(), "ccm", paths), Path("out0"), found=FOUND)
    assert "out0 exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not this merge"):
        merge(config(Path(), "ccm", paths), Path("out0"), found={**FOUND, "frames": 5})


def test_an_alpha_found_elsewhere_with_coordinates() -> None:
    made = target({"coordinate": 3}, {"high": 3, "low": 1}, found=FOUND)
    assert made.models == ["low", "high"]
    assert made.composition is not None
    assert made.composition.coefficients("w") == pytest.approx([0, 0.075, 0.925])
    assert made.alpha == FOUND


def test_the_example_of_two_axes_loads() -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "merge" / "two_axes.yaml"
    made = load_targets(path)
    assert [one.composition is not None and one.composition.layout.kind for one in made] == ["corners"] * len(made)
    assert not any(one.warnings for one in made)


@pytest.mark.parametrize(
    ("parameters", "coordinates", "words", "messages"),
    [
        ({"coordinate": 2, "power": 0}, {"low": 0, "high": 1}, {}, ("coordinate of low is 0", "positive")),
        ({"coordinate": -2, "power": 0}, LINE, {}, ("coordinate of the target is -2",)),
        ({"coordinate": 2, "power": "log"}, LINE, {}, ("a number", "'log'")),
        ({"coordinate": 2, "power": 1e4}, LINE, {}, ("power 10000", "-8 to 8")),
        ({"coordinate": CENTRE, "power": 0}, {**BOX, "a": {"viscosity": -1, "gravity": 2}}, {}, ("-1 in a",)),
        ({"coordinate": 2, "gamma": [{"value": 1}]}, LINE, {}, ("gamma", "no filters")),
        ({"coordinate": 2, "gamma": float("inf")}, LINE, {}, ("finite",)),
        ({"coordinate": 2, "straight": -1}, LINE, {}, ("straight", "-1")),
        ({"coordinate": 2, "clip": {"viscosity": -1}}, LINE, {}, ("clip", "the models do not")),
        ({"coordinate": CENTRE, "clip": {"viscosity": -1}}, BOX, {}, ("clip", "-1")),
        ({"coordinate": CENTRE, "gamma": {"viscosty": 1}}, BOX, {}, ("viscosty", "viscosity")),
        ({"coordinate": {"viscosity": 1}}, BOX, {}, ("coordinate of the target", "'gravity'")),
        ({"coordinate": 2}, BOX, {}, ("coordinate is one value", "2 axes (gravity, viscosity)")),
        ({"alpha": 2}, BOX, {}, ("alpha is one value",)),
        ({"alpha": {"viscosity": 1}}, BOX, {}, ("alpha of the target", "'gravity'")),
        ({"alpha": {"viscosity": 1}}, LINE, {}, ("'viscosity'", "give each model its coordinate by axis")),
        ({"alpha": {"viscosity": "much", "gravity": 1}}, BOX, {}, ("much", "by axis")),
        ({"alpha": {"viscosity": float("nan"), "gravity": 1}}, BOX, {}, ("finite",)),
        ({"alpha": {"viscosity": [{"fliter": "a", "value": 1}], "gravity": 1}}, BOX, {}, ("viscosity.0.fliter",)),
        ({"alpha": {1: 1, "gravity": 1}}, BOX, {}, ("alpha.1", "string")),
        ({"coordinate": CENTRE, "distance_limit": {"viscosity": 1}}, BOX, {}, ("distance_limit", "by axis")),
        ({"alpha": CENTRE, "coordinate": CENTRE}, BOX, {}, ("exactly one of alpha and coordinate",)),
        ({"coordinate": CENTRE}, STAR, {}, ("star", "base_model")),
        ({"coordinate": CENTRE}, {**BOX, "d": None}, {}, ("a has a coordinate and d has none",)),
        ({"coordinate": CENTRE}, {**BOX, "d": {}}, {}, ("coordinate of d names no axis",)),
        ({"coordinate": CENTRE}, {**BOX, "d": 3}, {}, ("coordinate of d has a plain number",)),
        ({"alpha": 0}, dict.fromkeys(BOX), {}, ("models has 4", "by axis")),
        ({}, BOX, {"sweep": {"alpha": [CENTRE]}}, ("sweep has alpha by axis", "list of entries")),
        ({}, LINE, {"sweep": {"alpha": [1]}, "found": FOUND}, ("prefix", "sweep")),
        ({}, LINE, {"merge_method": "linear", "found": FOUND}, ("prefix", "for ccm, not for linear")),
        ({}, BOX, {"found": FOUND}, ("prefix", "2 axes")),
    ],
)
def test_invalid_targets_are_refused(
    parameters: dict[str, Any], coordinates: dict[str, Any], words: dict[str, Any], messages: Any
) -> None:
    with pytest.raises(UserError) as caught:
        target(parameters, coordinates, **words)
    assert "\n" not in str(caught.value)
    for text in messages:
        assert text in str(caught.value)
