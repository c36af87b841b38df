"""Divisors of integers, for what must divide equally."""

from __future__ import annotations


def divisors(number: int) -> list[int]:
    """Divisors in increasing order; [1] for 0."""
    return [one for one in range(1, number + 1) if number % one == 0] or [1]


def nearest_divisor(size: int, number: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``size``; of two, the smaller one."""
    return min(divisors(number), key=lambda one: abs(one - size))
