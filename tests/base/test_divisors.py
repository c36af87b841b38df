"""Divisors of integers."""

from __future__ import annotations

import pytest

from shodh_moe.base.divisors import divisors, nearest_divisor


def test_divisors_increase() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(0) == [1]


@pytest.mark.parametrize(("size", "number", "nearest"), [(3, 4, 2), (5, 12, 4), (7, 4, 4), (6, 16, 4), (1, 5, 1)])
def test_the_nearest_divisor(size: int, number: int, nearest: int) -> None:
    assert nearest_divisor(size, number) == nearest
