"""The straightened path: exact least squares, nothing to do for linear networks, and smaller bends of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.curve import line, quadratic
from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.ccm.jacobian import extrapolated, least_squares, straightened_middle
from shodh_moe.ccm.windows import Scale
from tests.ccm.synthetic import expert_config, initial, make_expert


def apart(config: Any, share: float) -> tuple[Expert, Expert, Expert]:
    """An anchor and two experts; their distances from it scale with ``share``."""
    anchor = make_expert(config, 0)
    far = [make_expert(config, seed, near=anchor) for seed in (1, 2)]
    start = anchor.weights()
    with torch.no_grad():
        low, high = (
            anchor.with_weights({name: start[name] + share * (w - start[name]) for name, w in one.weights().items()})
            for one in far
        )
    return anchor, low, high


def bends(curve: Any, ends: tuple[Expert, Expert], frames: Tensor, alpha: float) -> float:
    """Distance of a step of the curve's network from the extrapolated steps of both experts."""
    wanted = extrapolated(*ends, alpha).predict(frames, 1, 0.0)
    return float(torch.linalg.vector_norm(curve(alpha).predict(frames, 1, 0.0) - wanted))


def test_least_squares_agree_with_a_direct_solution() -> None:
    random = torch.Generator().manual_seed(0)
    matrix, wanted = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((30, 8), (30,)))
    at = {"a": torch.randn(5, generator=random, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}

    def function(weights: dict[str, Tensor]) -> Tensor:
        values = torch.cat([weights["a"], weights["b"]])
        return matrix @ (values + 0.1 * (values - torch.cat([at["a"], at["b"]])) ** 2)

    found = least_squares(function, at, wanted, iterations=30)
    expected = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat([found["a"], found["b"]]), expected)
    short = least_squares(function, at, wanted, iterations=2)
    assert torch.cat([short["a"], short["b"]]).norm() < expected.norm()
    nothing = least_squares(function, at, torch.zeros(30, dtype=torch.float64))
    assert not torch.cat([nothing["a"], nothing["b"]]).any()


def test_experts_that_differ_where_the_network_is_linear_need_no_correction() -> None:
    # The network is linear in the weights of its last layer.
    anchor, low, high = apart(expert_config(), 1.0)
    common = anchor.weights()
    low, high = (
        anchor.with_weights({n: w if n.startswith("out.") else common[n] for n, w in one.weights().items()})
        for one in (low, high)
    )
    frames = initial(3, count=4)
    for at in (None, anchor):
        middle, average = straightened_middle(low, high, frames, at), compose(low, high, 0.0)
        for name, values in middle.weights().items():
            torch.testing.assert_close(values, average.weights()[name], atol=1e-6, rtol=1e-5)
    for alpha in (-1.5, 0.0, 0.7):
        assert bends(line(low, high), (low, high), frames, alpha) < 1e-5


@pytest.mark.parametrize("network", [{}, {"kind": "dpot", "size": "tiny", "coordinates": "cells", "history": 2}])
@pytest.mark.parametrize("where", ["average", "anchor"])
def test_the_parabola_is_straighter_than_the_line(network: dict[str, Any], where: str) -> None:
    config = expert_config(network=network, family={"grid": 24}) if network else expert_config()
    anchor, low, high = apart(config, 0.25)
    grid, history = config.family.grid, config.network.history
    frames = torch.cat([initial(seed, count=3, grid=grid) for seed in range(history)], dim=1)
    middle = straightened_middle(low, high, frames, anchor if where == "anchor" else None)
    curve = quadratic(low, middle, high)
    for alpha in (-1.4, -0.5, 0.0, 0.6, 1.4):
        assert bends(curve, (low, high), frames, alpha) < 0.6 * bends(line(low, high), (low, high), frames, alpha)
    if not network:  # a few frames determine little of the DPOT
        fresh = initial(7, count=3)
        assert bends(curve, (low, high), fresh, 0.0) < 0.9 * bends(line(low, high), (low, high), fresh, 0.0)


def test_what_remains_is_of_higher_order_in_the_distance_of_the_experts() -> None:
    frames, remaining = initial(3, count=2), []
    for share in (0.4, 0.1):
        _, low, high = apart(expert_config(), share)
        curve = quadratic(low, straightened_middle(low, high, frames, iterations=40), high)
        remaining.append(
            bends(curve, (low, high), frames, 1.5) / bends(line(low, high), (low, high), frames, 1.5)
        )  # fmt: skip
    assert remaining[1] < 0.5 * remaining[0]


def test_extrapolated_predictions_are_the_experts_at_the_ends(ends: tuple[Expert, Expert]) -> None:
    first = initial(0)
    for alpha, expert in zip((-1.0, 1.0), ends, strict=True):
        assert torch.equal(extrapolated(*ends, alpha).predict(first, 3, 0.0), expert.predict(first, 3, 0.0))
    once = [one.predict(first, 1, 0.0) for one in ends]
    torch.testing.assert_close(extrapolated(*ends, 1.4).predict(first, 1, 0.0), -0.2 * once[0] + 1.2 * once[1])


def test_an_anchor_of_other_units_is_refused(ends: tuple[Expert, Expert]) -> None:
    other = make_expert(ends[0].config, 3, scale=Scale((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(UserError, match="different units"):
        straightened_middle(*ends, initial(0), other)
