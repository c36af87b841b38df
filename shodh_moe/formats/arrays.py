"""A common interface to the arrays in files of all formats: list names, get shapes, read parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.formats.packed_values import Packing

Part = tuple[int | slice, ...]
READ_ATTRIBUTES = ("time", "times", "t", "units")


@dataclass(frozen=True)
class Array:
    """One stored array.

    Attributes:
        path, name: its file, and its name in the file.
        shape: its shape.
        raw: reads a part, given an index or a slice for each axis, in the stored dtype.
        packing: how stored numbers become values, as NetCDF attributes state it; None: they are the values.
        attributes: its attributes that may state a time or units, with names in lower case; ``time_unit`` is the unit
            of the time, if that is known.
        dimensions: names of its axes, "" where one has none; empty if the file has no such names.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    raw: Callable[[Part], Any] = field(repr=False)
    packing: Packing | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    dimensions: tuple[str, ...] = ()

    def read(self, part: Part) -> NDArray[np.float64]:
        """Read a part as float64; packed NetCDF values are unpacked, missing values become NaN.

        Raises:
            UserError: this part of the file is damaged.
        """
        try:
            stored = np.asarray(self.raw(part))
            with np.errstate(all="ignore"):  # what is no value becomes NaN or infinite, without a warning
                return stored.astype(np.float64) if self.packing is None else self.packing.values(stored)
        except UserError:
            raise
        except Exception as error:  # whatever a library raises
            raise _unreadable(self.path, self.name, error) from error


class ArrayFile:
    """An open file: the names of its arrays, a function that opens each of them, and attributes as in `Array`.

    Attributes:
        path: the file.
        unusable: what the other names in the file are, which cannot be read, to complete "NAME is ...".
        attributes: as in `Array`.
        in_memory: whether arrays that were opened are in memory, so that only few files should be open.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, Callable[[], Array]],
        attributes: dict[str, Any] | None = None,
        unusable: dict[str, str] | None = None,
        in_memory: bool = False,
    ):
        self.path, self._arrays = path, arrays
        self.attributes, self.unusable, self.in_memory = attributes or {}, unusable or {}, in_memory
        self._open: dict[str, Array] = {}

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def array(self, name: str) -> Array:
        """Return an array by name. Raises `UserError` if it does not contain real numbers, or is damaged."""
        if name not in self._open:
            try:
                self._open[name] = self._arrays[name]()
            except UserError:
                raise
            except Exception as error:  # whatever a library raises
                raise _unreadable(self.path, name, error) from error
        return self._open[name]

    def seen_through(self, view: Callable[[Array], Array]) -> ArrayFile:
        """The same file, each of whose arrays is passed through ``view``."""

        def opener(name: str) -> Callable[[], Array]:
            return lambda: view(self.array(name))

        return ArrayFile(
            self.path, {name: opener(name) for name in self._arrays}, self.attributes, self.unusable, self.in_memory
        )


def require_numbers(path: Path, name: str, dtype: np.dtype[Any]) -> None:
    """Raise `UserError` unless the dtype is one of real numbers."""
    if dtype.kind not in "biuf" or dtype.itemsize > 16:
        raise UserError(f"{path}: {name} holds {dtype}, expected real numbers")


def plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that are text or numbers, which another process can be given; others state no time and no unit."""
    kinds = {key: np.asarray(value).dtype.kind for key, value in attributes.items()}
    return {key: value for key, value in attributes.items() if kinds[key] in "biufSU"}


def _unreadable(path: Path, name: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot read {name} ({printable(first_line(error))[:200]}): copy it again")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
