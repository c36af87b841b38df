"""The bend of a path: zero for a network that is linear in its weights, and growing with distance otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.ccm.readout import BEND_ALPHAS, BEND_TOLERANCE, bend, straight_to
from tests.ccm.synthetic import initial


def test_experts_that_differ_only_in_the_last_layer_lie_on_a_straight_path(ends: tuple[Expert, Expert]) -> None:
    low, high = ends
    linear = low.with_weights({k: high.weights()[k] if k.startswith("out.") else v for k, v in low.weights().items()})
    bends = bend(low, linear, initial(0))
    assert max(bends.values()) < 1e-3
    assert straight_to(bends) == max(BEND_ALPHAS)


def test_other_paths_bend_more_farther_out(ends: tuple[Expert, Expert]) -> None:
    bends = bend(*ends, initial(0))
    assert sorted(bends) == sorted({sign * size for size in BEND_ALPHAS for sign in (-1, 1)})
    assert all(bends[sign * 2.0] > bends[sign * 1.25] > 0.01 for sign in (-1, 1))
    # Compare with the definition at one point.
    low, high = (one.scale.normalise(one.predict(initial(0), 1, 0.0)) for one in ends)
    at = compose(*ends, 1.5)
    line = low + (1.5 + 1) / 2 * (high - low)
    off = torch.linalg.vector_norm(at.scale.normalise(at.predict(initial(0), 1, 0.0)) - line)
    assert bends[1.5] == pytest.approx(float(off / torch.linalg.vector_norm((high - low) / 2)), rel=1e-4)


def test_the_straight_range_ends_where_either_side_leaves_the_line() -> None:
    bends = {sign * size: 0.0 for size in BEND_ALPHAS for sign in (-1.0, 1.0)}
    more = 1.01 * BEND_TOLERANCE
    assert straight_to(bends) == 2.0
    assert straight_to({**bends, 1.75: more}) == 1.5
    assert straight_to({**bends, -1.5: more}) == 1.25
    assert straight_to({**bends, -1.5: BEND_TOLERANCE}) == 2.0
    # Points that return to the line farther out do not count.
    assert straight_to({**bends, 1.25: more, 1.5: 0.0}) == 1.0
    assert straight_to({**bends, 0.5: more}) == 1.0
    assert straight_to({**bends, 1.5: math.nan}) == 1.25
