"""Turn stored numbers into values by the NetCDF attributes of their variable: packing, missing and invalid values.

The rules are those of the netCDF4 library's masked and scaled reading, with which the tests compare every value. Where
the library ignores an attribute with a warning, this refuses it. The library itself does not read the files: it returns
zeros for the lost part of a truncated NetCDF 3 file, and follows links out of a NetCDF 4 file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError

ATTRIBUTES = (
    *("scale_factor", "add_offset", "_FillValue", "missing_value"),
    *("valid_min", "valid_max", "valid_range", "_Unsigned"),
)
# What NetCDF stores where nothing was written, by dtype. Bytes have none, as the NetCDF User Guide recommends: masks
# and packed values use all of them. (The library takes 255, or -127, for missing.)
_DEFAULT_FILL = {
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": 9.9692099683868690e36,
    "f8": 9.9692099683868690e36,
}


@dataclass(frozen=True)
class Packing:
    """How the stored numbers of a variable become values.

    Attributes:
        dtype: the type as which the stored bytes are read, signed or unsigned.
        missing: stored numbers that stand for no value.
        low, high: smallest and largest valid stored number; None: no limit.
        factor, offset: value = factor * stored number + offset.
    """

    dtype: np.dtype[Any]
    missing: NDArray[Any]
    low: Any = None
    high: Any = None
    factor: float = 1.0
    offset: float = 0.0

    def values(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        """Return the values as float64, NaN where one is missing or invalid."""
        stored = stored.astype(stored.dtype.newbyteorder("=")).view(self.dtype)
        bad = np.isin(stored, self.missing)
        if self.low is not None:
            bad |= stored < self.low
        if self.high is not None:
            bad |= stored > self.high
        values = stored.astype(np.float64)
        if (self.factor, self.offset) != (1.0, 0.0):
            values = values * self.factor + self.offset
        values[bad] = np.nan
        return values


def packing(where: str, attributes: dict[str, Any], dtype: np.dtype[Any], netcdf: bool) -> Packing | None:
    """Read the packing of a variable from its attributes; None if stored numbers are the values.

    Args:
        where: file and variable, for messages.
        attributes: those of `ATTRIBUTES` that the variable has.
        netcdf: whether it is a NetCDF variable: without ``_FillValue``, the default fill value of its type is missing.

    Raises:
        UserError: an attribute is no number, has a wrong count of numbers, or does not fit the variable's type.
    """
    stored = dtype = dtype.newbyteorder("=")
    unsigned = _text(attributes.get("_Unsigned", "")).strip("\0 ").lower()
    if dtype.kind in "iu" and unsigned in ("true", "false"):
        dtype = np.dtype(f"{'u' if unsigned == 'true' else 'i'}{dtype.itemsize}")
    numbers = {key: _numbers(f"{where}: {key}", value) for key, value in attributes.items() if key != "_Unsigned"}
    for key, found in numbers.items():
        size = {"valid_range": 2, "missing_value": len(found)}.get(key, 1)
        if len(found) != size:
            raise UserError(f"{where}: {key} holds {len(found)} numbers, expected {size}: correct it")
    limits = {
        key: _cast(where, key, numbers[key], dtype)
        for key in ("_FillValue", "missing_value", "valid_min", "valid_max", "valid_range")
        if key in numbers
    }
    missing = [limits[key] for key in ("_FillValue", "missing_value") if key in limits]
    # Of signed numbers that are read as unsigned, the default fill value is a common one.
    common = stored.kind == "i" and dtype.kind == "u"
    if netcdf and "_FillValue" not in limits and stored.str[1:] in _DEFAULT_FILL and not common:
        missing.append(np.array([_DEFAULT_FILL[stored.str[1:]]], stored).view(dtype))
    low, high = limits.get("valid_range", [limits.get(key, [None])[0] for key in ("valid_min", "valid_max")])
    factor, offset = (float(numbers.get(key, [other])[0]) for key, other in (("scale_factor", 1), ("add_offset", 0)))
    if not numbers and not missing and dtype == stored:
        return None
    return Packing(dtype, np.concatenate([np.empty(0, dtype), *missing]), low, high, factor, offset)


def _numbers(where: str, value: Any) -> NDArray[Any]:
    """Return the numbers of an attribute, which some programs write as text."""
    found = np.ravel(value)
    if found.dtype.kind in "iuf":
        return found
    try:
        return np.array([float(part) for part in _text(value).strip("\0 ").replace(",", " ").split()])
    except ValueError as error:
        raise UserError(
            f"{where} is {_text(value)[:40]!r}, expected a number: correct it, e.g. with ncatted"
        ) from error


def _cast(where: str, key: str, numbers: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert the numbers of an attribute to the variable's type, to compare them with its stored numbers."""
    types = [dtype]
    if dtype.kind in "iu":
        # The attributes of an unsigned variable may be written as signed numbers of the same bytes.
        types.append(np.dtype(f"{'i' if dtype.kind == 'u' else 'u'}{dtype.itemsize}"))
    for one in types:
        with np.errstate(all="ignore"):
            cast = numbers.astype(one)
            same = (cast == numbers) | ((cast != cast) & (numbers != numbers))
            if dtype.kind == "f":
                same |= np.abs(cast - numbers) <= np.finfo(dtype).eps * np.abs(numbers)
        if same.all():
            return cast.view(dtype)
    raise UserError(
        f"{where}: {key} is {', '.join(f'{one:g}' for one in numbers[:4])}, which the stored type {dtype} cannot hold: "
        "correct it, e.g. with ncatted"
    )


def _text(value: Any) -> str:
    parts = [one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in np.ravel(value)]
    return " ".join(parts)
