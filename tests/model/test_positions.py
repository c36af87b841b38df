"""Rotary positions that close on themselves along periodic axes."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.model.attention import rotate
from shodh_moe.model.positions import axial_rotary, periodic_rotary, token_angles


# Turns of the five pairs of an axis with N tokens: N / 2, N / 4, N / 8, N / 16, N / 32, rounded (halves down).
@pytest.mark.parametrize(
    ("size", "turns"),
    [(1, [1, 0, 0, 0, 0]), (2, [1, 0, 0, 0, 0]), (3, [1, 1, 0, 0, 0]), (4, [2, 1, 0, 0, 0]), (6, [3, 1, 1, 0, 0]),
     (8, [4, 2, 1, 0, 0]), (16, [8, 4, 2, 1, 0])],
)  # fmt: skip
def test_every_pair_makes_whole_turns_on_a_periodic_axis(size, turns):
    angles_SP = periodic_rotary([size, 1, 1], head_width=32)
    expected = torch.arange(size)[:, None] * torch.tensor(turns) * (2 * math.pi / size)
    torch.testing.assert_close(angles_SP[:, :5], expected.double())
    assert not angles_SP[:, 15:].any()


@pytest.mark.parametrize("width", [6, 12, 32])
@pytest.mark.parametrize("size", [2, 4, 5, 12, 64])
def test_no_two_tokens_have_the_same_position(width, size):
    angles_SP = periodic_rotary([size, 1, 1], width)
    points = torch.cat([angles_SP.cos(), angles_SP.sin()], dim=1)
    distance = torch.cdist(points, points) + torch.eye(size) * 9
    assert distance.min() > 1 / size


def test_the_last_token_is_beside_the_first_along_periodic_axes_alone():
    angles_BSP = token_angles((4, 4, 1), 30, torch.device("cpu"), torch.tensor([[True, False, False]]))[:, 0]
    q, k = torch.randn(2, 30, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        rows = [rotate(x[None, None, None], angles_BSP[:, 4 * i + j]) for x, (i, j) in ((q, a), (k, b))]
        return float((rows[0] * rows[1]).sum())

    assert score((3, 0), (0, 0)) == pytest.approx(score((0, 0), (1, 0)))  # one step up
    assert score((0, 3), (0, 0)) != pytest.approx(score((0, 0), (0, 1)))
    assert score((0, 0), (1, 0)) != pytest.approx(score((1, 0), (0, 0)))  # up is not down


def test_positions_are_open_unless_the_axis_is_periodic():
    none_B3 = torch.zeros(2, 3, dtype=torch.bool)
    expected = axial_rotary([4, 2, 3], 24)
    assert torch.equal(token_angles((4, 2, 3), 24, torch.device("cpu")), expected)
    assert torch.equal(token_angles((4, 2, 3), 24, torch.device("cpu"), none_B3)[1, 0], expected)
