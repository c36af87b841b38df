"""Factors from the units that files state to those of the mapping."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.mapping import Mapping, Scale
from shodh_moe.formats import Array

_DIMENSIONS = {
    "length": ("[length]",),
    "time": ("[time]",),
    "velocity": ("[length] / [time]",),
    # Pressure, or pressure over density.
    "pressure": ("[mass] / [length] / [time] ** 2", "[length] ** 2 / [time] ** 2"),
}
# Names of units with small exponents: the parser would compute 9**9**9.
_NAMES = r"[A-Za-zµμ_ ()/*.·^]*"
_UNITS = re.compile(rf"{_NAMES}(?:[-+]?[1-4](?![0-9.])(?! *(?:\*\*|\^)){_NAMES})*")


def scale_of(stated: dict[str, list[Array]], mapping: Mapping) -> Scale:
    """Return the factors for length, time, velocity and pressure.

    Args:
        stated: for each of these the arrays from which it is read. Where they state a unit that converts to the
            mapping's, this gives the factor; otherwise the mapping's ``scale`` does.

    Raises:
        UserError: arrays of one quantity state different units, a unit is of another quantity, or the mapping's
            ``scale`` has another factor.
    """
    return Scale(**{quantity: _factor(quantity, arrays, mapping) for quantity, arrays in stated.items()})


def conversion(quantity: str, unit: str, wanted: str, where: str) -> float | None:
    """Return the factor from a unit to another; None if one of them is unknown, or no unit of mechanics.

    Args:
        where: file and dataset that state the unit, for messages.

    Raises:
        UserError: the unit is one of mechanics, but not one of this quantity that converts to ``wanted``.
    """
    target, source = _parsed(wanted), _parsed(unit.split(" since ")[0])
    if target is None or source is None or str(target.dimensionality) not in _DIMENSIONS[quantity]:
        return None
    if not set(source.dimensionality) <= {"[length]", "[time]", "[mass]"} or source.dimensionless:
        return None  # such as the liter, tesla and coulomb that L, T and C are not meant to be
    if source.dimensionality != target.dimensionality:
        cure = ", or set scale.pressure to one over the density" if quantity == "pressure" else ""
        raise UserError(f"{where} is in {unit!r}, which does not convert to {wanted!r}: correct units.{quantity}{cure}")
    return float(_registry().convert(1.0, source, target))


def _factor(quantity: str, arrays: list[Array], mapping: Mapping) -> float:
    given = getattr(mapping.scale, quantity)
    explicit = quantity in mapping.scale.model_fields_set
    arrays = [array for array in arrays if unit_of(array)]
    if not arrays:
        return float(given)
    unit, where = unit_of(arrays[0]), f"{arrays[0].path}: {arrays[0].name}"
    for array in arrays[1:]:
        require_same_unit(arrays[0], array)
    wanted = mapping.units.of()[quantity]
    try:
        factor = conversion(quantity, unit, wanted, where)
    except UserError:
        if explicit and quantity == "pressure":
            return float(given)  # one over a density, which turns Pa into (m/s)^2
        raise
    if factor is None:
        return float(given)
    if explicit and abs(given - factor) > 1e-3 * factor:
        raise UserError(
            f"{where} is in {unit!r}, of which the factor to {wanted!r} is {factor:g}, but scale.{quantity} is "
            f"{given:g}: leave it out, or correct units.{quantity}"
        )
    return factor


def require_same_unit(first: Array, array: Array) -> None:
    """Refuse an array in another unit than the first of its quantity; one without a unit has the same."""
    unit, other = unit_of(first), unit_of(array)
    if unit and other not in ("", unit) and (_parsed(other) is None or _parsed(other) != _parsed(unit)):
        beside = f"{array.name} of {array.path}"
        raise UserError(f"{first.path}: {first.name} is in {unit!r}, but {beside} in {other!r}: convert one of them")


def unit_of(array: Array) -> str:
    """Return the unit that an array states in its attribute ``units``; "" if it states none."""
    value = array.attributes.get("units", "")
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return text.strip("\0 ") if isinstance(text, str) else ""


@cache
def _registry() -> Any:
    # Imported here: it takes half a second, and most files state no units.
    import pint

    # UDUNITS writes exponents without a sign: m s-1.
    return pint.UnitRegistry(preprocessors=[lambda text: re.sub(r"(?<=[A-Za-zµμ])(?=[-+]?[1-9])", "**", text)])


@cache
def _parsed(unit: str) -> Any:
    """Return pint's unit, or None if it is unknown."""
    text = unit.strip()
    if not text or len(text) > 60 or not _UNITS.fullmatch(text):
        return None
    try:
        return _registry().parse_units(text)
    except Exception:  # pint raises errors of many kinds for text that is no unit
        return None
