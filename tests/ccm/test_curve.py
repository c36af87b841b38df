"""Curved paths pass through three points, groups of layers have an alpha each, and controls have the true length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.curve import (
    GROUPS,
    LAYERS,
    by_group,
    by_layer,
    direction_of_twins,
    distance,
    fit_groups,
    layer_of,
    length,
    line,
    quadratic,
    random_direction,
    require_one_anchor,
)
from shodh_moe.ccm.expert import Expert, compose, load_expert
from shodh_moe.ccm.readout import fit_prefix, fit_prefix_on
from shodh_moe.ccm.windows import Scale
from shodh_moe.checkpoint.state import load_state
from tests.ccm.synthetic import CHANNELS, expert_config, initial, make_expert, save_expert


def same(one: Expert, other: Expert) -> bool:
    return all(torch.equal(values, other.weights()[name]) for name, values in one.weights().items())


def near(one: Expert, other: Expert) -> bool:
    return all(torch.allclose(values, other.weights()[name], atol=1e-6) for name, values in one.weights().items())


@pytest.mark.parametrize("at", [0.0, 0.4])
def test_a_parabola_passes_through_its_three_experts_bit_for_bit(ends: tuple[Expert, Expert], at: float) -> None:
    low, high = ends
    middle = make_expert(low.config, 9, near=low)
    curve = quadratic(low, middle, high, at)
    assert same(curve(-1.0), low)
    assert same(curve(at), middle) if at == 0 else near(curve(at), middle)
    assert same(curve(1.0), high)
    # Three points of any parabola determine its others: f(2 at) from f(-1), f(at), f(1).
    for alpha in (-1.5, 0.7, 1.5):
        expected = {
            name: (alpha - at) * (alpha - 1) / ((-1 - at) * -2) * values
            + (alpha + 1) * (alpha - 1) / ((at + 1) * (at - 1)) * middle.weights()[name]
            + (alpha + 1) * (alpha - at) / (2 * (1 - at)) * high.weights()[name]
            for name, values in low.weights().items()
        }
        assert near(curve(alpha), low.with_weights(expected))


def test_without_bow_the_path_is_the_line(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    middle = make_expert(low.config, 9, near=low)
    for alpha in (-1.5, 0.3, 1.2):
        assert near(quadratic(low, middle, high, bow=0.0)(alpha), compose(low, high, alpha))
        assert same(line(low, high)(alpha), compose(low, high, alpha))
    half = quadratic(low, middle, high, bow=0.5)(0.0)
    average = compose(low, high, 0.0)
    expected = {name: (values + average.weights()[name]) / 2 for name, values in middle.weights().items()}
    assert near(half, low.with_weights(expected))


@pytest.mark.parametrize("at", [-1.0, 1.0, 1.3])
def test_a_middle_that_is_not_between_the_ends_is_refused(ends: tuple[Expert, Expert], at: float) -> None:
    with pytest.raises(UserError, match=r"is at alpha = -?1.*, not between"):
        quadratic(ends[0], ends[1], ends[1], at)


def test_a_middle_of_other_units_or_another_network_is_refused(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    with pytest.raises(UserError, match="different units"):
        quadratic(low, make_expert(low.config, 3, scale=Scale((0.0, 0.0), (1.0, 1.0))), high)
    with pytest.raises(UserError, match="different networks"):
        quadratic(low, make_expert(expert_config(network={"coordinates": "cells"}), 3), high)


def test_experts_of_another_anchor_are_refused(ends: tuple[Expert, Expert], tmp_path: Path) -> None:
    anchors = [
        load_expert(Path(save_expert(tmp_path / name / "1", one.config, one.network, one.scale, CHANNELS)))
        for name, one in zip(("a", "b"), ends, strict=True)
    ]
    found = []
    for number, (anchor, one) in enumerate(zip((0, 0, 1), (*ends, ends[0]), strict=True)):
        start = {"path": str(anchors[anchor].path), "step": 1, "sha256": load_state(anchors[anchor].path)["sha256"]}
        path = tmp_path / f"expert{number}" / "1"
        found.append(load_expert(Path(save_expert(path, one.config, one.network, one.scale, CHANNELS, start=start))))
    require_one_anchor(found[:2])
    require_one_anchor(found[:2], anchors[0])
    with pytest.raises(UserError, match=r"expert2/1 was not fine-tuned from the anchor of .*expert0/1"):
        require_one_anchor(found)
    with pytest.raises(UserError, match=r"a/1 was not fine-tuned from an anchor"):
        require_one_anchor(anchors)
    with pytest.raises(UserError, match=r"expert0/1 was not fine-tuned from .*b/1"):
        require_one_anchor(found[:2], anchors[1])


@pytest.mark.parametrize("network", [{}, {"kind": "dpot", "size": "tiny", "coordinates": "cells"}])
def test_every_parameter_belongs_to_one_layer(network: dict[str, str]) -> None:
    expert = make_expert(expert_config(network=network, family={"grid": 24}), 0)
    found = {name: layer_of(name) for name in expert.weights()}
    assert set(found.values()) == set(LAYERS)
    assert {layer for layers in GROUPS.values() for layer in layers} == set(LAYERS)
    for name in ("spectral.0.weight", "blocks.3.attention.weight1"):
        if name in found:
            assert found[name] == "spectral"
    with pytest.raises(UserError, match=r"modulation\.hidden\.weight belongs to none of the layers"):
        layer_of("modulation.hidden.weight")


def test_layers_without_an_alpha_are_the_average(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    mixed, average = by_layer(low, high, {"spectral": 1.0}), compose(low, high, 0.0)
    for name, values in mixed.weights().items():
        assert torch.equal(values, (high if name.startswith("spectral") else average).weights()[name])
    assert same(by_group(low, high, dict.fromkeys(GROUPS, 0.6)), compose(low, high, 0.6))


def test_groups_find_the_alphas_of_the_data(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    wanted = {"input": -0.5, "blocks": 0.8, "output": 0.2}
    first = initial(0)
    fields = torch.cat([first, by_group(low, high, wanted).predict(first, 3, 0.0)], dim=1)
    start = fit_prefix(low, high, fields)
    alphas, error = fit_groups(low, high, fields, start.alpha, sweeps=4)
    assert error < 0.3 * start.error
    assert alphas == pytest.approx(wanted, abs=0.2)
    spoilt = torch.cat([fields, torch.full_like(fields, torch.nan)], dim=1)
    assert fit_groups(low, high, spoilt, start.alpha, sweeps=1)[1] < start.error  # later frames do not count
    # Without anything to gain, the start is kept.
    straight = torch.cat([first, compose(low, high, 0.25).predict(first, 3, 0.0)], dim=1)
    assert fit_groups(low, high, straight, 0.25)[1] <= fit_prefix(low, high, straight).error + 1e-6


def test_the_prefix_of_a_curve_reveals_its_alpha(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    curve = quadratic(low, make_expert(low.config, 9, near=low), high)
    first = initial(0)
    fields = torch.cat([first, curve(0.6).predict(first, 3, 0.0)], dim=1)
    assert fit_prefix_on(curve, 1, fields).alpha == pytest.approx(0.6, abs=0.02)


def test_control_directions_are_as_long_as_the_experts_own(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    one, other = random_direction(low, high, 3)
    for name, values in low.weights().items():
        own, random = (high.weights()[name] - values), (other.weights()[name] - one.weights()[name])
        assert float(random.norm()) == pytest.approx(float(own.norm()), rel=1e-4)
    assert near(compose(one, other, 0.0), compose(low, high, 0.0))
    assert same(one, random_direction(low, high, 3)[0])
    assert not same(one, random_direction(low, high, 4)[0])
    twin = make_expert(low.config, 9, near=low)
    one, other = direction_of_twins(low, high, low, twin)
    assert distance(one, other, low) == pytest.approx(distance(low, high, low), rel=1e-4)
    assert near(compose(one, other, 0.0), compose(low, high, 0.0))
    ratio = {name: (other.weights()[name] - one.weights()[name]) for name in low.weights()}
    along = {name: twin.weights()[name] - values for name, values in low.weights().items()}
    assert length(ratio) == pytest.approx(2 * length({k: v / 2 for k, v in ratio.items()}), rel=1e-6)
    name = "spectral.0.weight"
    cosine = torch.nn.functional.cosine_similarity(ratio[name].flatten(), along[name].flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)
