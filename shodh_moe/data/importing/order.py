"""Order names by the numbers in them, as numbers: 9 before 10, 0.0015 after 0.001, -1 before 1, 1e-5 before 1e-4."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise, zip_longest

from shodh_moe.base.errors import UserError

# A dot begins a number only after a separator: u_.5 is a decimal, and plot.0005 has the counter 5.
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|(?<![A-Za-z0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?"
# After a letter or digit, as in part-1, a dash separates; anywhere else it is a sign.
_SPLIT = re.compile(f"((?:(?<![A-Za-z0-9])[-+])?{_NUMBER})")
_SPLIT_WITH_SIGNS = re.compile(f"([-+]?{_NUMBER})")
# Decimals, or two counters: 0.15, and 0,15 and 0p15 as some programs write them.
_TWO_PARTS = re.compile(r"[0-9]+([.,p])([0-9]+)")


def number_key(name: str, signs: bool = False) -> list[tuple[int, Decimal, str]]:
    """Sort key that compares the numbers in a name by value.

    Args:
        signs: a dash before a number is always a sign, even after a letter.
    """
    parts = (_SPLIT_WITH_SIGNS if signs else _SPLIT).split(name)
    return [(0, Decimal(part), "") if index % 2 else (1, Decimal(0), part) for index, part in enumerate(parts) if part]


def by_numbers(names: Sequence[str], remedy: str) -> list[int]:
    """Return the indices of names in the order of their numbers.

    Args:
        names: names that differ in nothing but numbers.
        remedy: what the user can do about names without an order, for the messages.

    Raises:
        UserError: names differ in more than their numbers, have equal numbers, or can be read in two ways (1.10 is
            1.1, or the tenth of 1).
    """
    keys = [number_key(name) for name in names]
    if len({_texts(key) for key in keys}) > 1:
        keys = [number_key(name, signs=True) for name in names]
    for name, key in zip(names, keys, strict=True):
        if _texts(key) != _texts(keys[0]):
            raise UserError(
                f"{names[0]} and {name} differ in more than their numbers, so their order is open: {remedy}"
            )
    order = sorted(range(len(names)), key=keys.__getitem__)
    for one, other in pairwise(order):
        if keys[one] == keys[other]:
            raise UserError(f"{names[one]} and {names[other]} have the same numbers, so their order is open: {remedy}")
    _require_one_reading(names, remedy)
    return order


def _texts(key: list[tuple[int, Decimal, str]]) -> tuple[str | None, ...]:
    """Return the parts of a key, with None for every number."""
    return tuple(text if kind else None for kind, _, text in key)


def _require_one_reading(names: Sequence[str], remedy: str) -> None:
    """Refuse names such as 1.9 and 1.10, or 0p1 and 0p15, which may be decimals or two counters."""
    found = [_TWO_PARTS.finditer(name) for name in names]
    for column in zip_longest(*found):
        matches = [match for match in column if match]
        varies = len({match[0] for match in matches}) > 1 and len({len(match[2]) for match in matches}) > 1
        # Decimals of different length have no zeros at their end: 0.1, 0.15, 0.2.
        unclear = [match for match in matches if match[1] != "." or match[2][-1] == "0"]
        if varies and unclear:
            raise UserError(
                f"{unclear[0][0]} in {unclear[0].string} may be a decimal number or two counters, so the order is "
                f"open: {remedy}"
            )


def largest_gap(names: Sequence[str]) -> tuple[str, str] | None:
    """Return two neighbours between which a name seems to be missing; None if the only number that varies has no gap.

    Args:
        names: names in the order of their numbers.
    """
    columns = [[value for _, value, _ in column] for column in zip(*map(number_key, names), strict=False)]
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) != 1:
        return None
    steps = [float(after - before) for before, after in pairwise(varying[0])]
    most = max(steps)
    # Rounded numbers, such as 0.33, 0.67, 1, differ in their steps by a little.
    gap = most > 1.5 * min(steps) > 0
    return (names[steps.index(most)], names[steps.index(most) + 1]) if gap else None
