"""A folder of a user's own regimes: HDF5 files in the schema of The Well or in PDEBench's layouts, with a parameter.

The parameter is a scalar of The Well's file or a setting in the ``config`` of PDEBench's, or stands in a table: a CSV
file with the columns ``file`` (relative to the folder) and one named after the parameter. Files may hold trajectories
of several regimes, and a regime may be spread over several files.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import pdebench, well
from shodh_moe.config.compare import fingerprint, flatten
from shodh_moe.config.content import Listing, content_of, remember_content

SUFFIXES = (".hdf5", ".h5", ".hdf")


class Stored(NamedTuple):
    """Trajectories of one file: ``fields`` [N, T, C, H, W] float32, time ``interval``, and names of ``channels``."""

    fields: torch.Tensor
    interval: float
    channels: tuple[str, ...]


class _Header(NamedTuple):
    channels: tuple[str, ...]
    shape: tuple[int, int]
    snapshots: int
    interval: float
    total: int
    parameters: dict[str, list[float]]  # of each trajectory, by name


class _Piece(NamedTuple):
    path: Path
    trajectories: tuple[int, ...]


@dataclass(frozen=True)
class RegimeFolder:
    """The files of a folder.

    Attributes:
        channels: names of the C channels.
        shape: H, W.
        snapshots: states per trajectory.
        interval: time between them.
        content: identity of the files' content and of their parameters.
        pieces: the trajectories at each value of the parameter.
    """

    channels: tuple[str, ...]
    shape: tuple[int, int]
    snapshots: int
    interval: float
    content: str
    pieces: dict[float, list[_Piece]]

    def identity(self) -> dict[str, Any]:
        """What data read from the folder depend on, ready for JSON; not where the folder lies."""
        return {"content": self.content, "channels": list(self.channels)}

    def count(self, value: float) -> int:
        """Number of trajectories at a value of the parameter."""
        return sum(len(piece.trajectories) for piece in self.pieces[value])

    def read(self, value: float, count: int) -> torch.Tensor:
        """The first ``count`` trajectories at a value of the parameter: [N, T, C, H, W] float32.

        Raises:
            UserError: a file is damaged or has values that are not finite.
        """
        parts, left = [], count
        for piece in self.pieces[value]:
            wanted = piece.trajectories[:left]
            if not wanted:
                break
            stored = read_stored(piece.path, wanted[0], wanted[-1] + 1)
            rows = [index - wanted[0] for index in wanted]
            channels = [stored.channels.index(name) for name in self.channels]
            parts.append(stored.fields[rows][:, :, channels])
            left -= len(wanted)
        return torch.cat(parts)


def read_stored(path: Path, start: int = 0, stop: int | None = None) -> Stored:
    """Read trajectories of a file of The Well or PDEBench. Raises `UserError` as `well.read` and `pdebench.read` do."""
    found = (well if _is_well(path) else pdebench).read(path, start, stop)
    return Stored(found.fields, found.interval, found.channels)


def same_value(value: float) -> float:
    """Round to six digits: values of a parameter that agree in these are one regime (files often hold float32)."""
    return float(f"{value:.6g}")


def scan(folder: Path, parameter: str, table: Path | None, channels: list[str] | None, root: Path) -> RegimeFolder:
    """List the regimes of a folder; only the beginning of each file is read, besides its content for the identity.

    Args:
        channels: names of the channels to use, in this order; None for all.
        root: folder in which `remember` keeps the hashes of the files.

    Raises:
        UserError: the folder is missing or has no files; a file is damaged, does not fit the others, or has no such
            parameter or channel; or the table is unreadable or does not fit the folder.
    """
    listing = _listing(folder)
    by_table = _read_table(table, parameter, folder, listing) if table else None
    headers = {path: _header(*key) for path, key in listing.items()}
    first, head = next(iter(headers.items()))
    for path, header in headers.items():
        if differing := next((key for key in ("channels", "shape", "interval") if not _same(header, head, key)), None):
            theirs, ours = (getattr(one, differing) for one in (head, header))
            raise UserError(
                f"{path} has the {differing} {_text(ours)}, but {first} has {_text(theirs)}: all files of a family "
                "need the same"
            )
    if unknown := next((name for name in channels or () if name not in head.channels), None):
        raise UserError(f"{first} has no channel {unknown!r}: choose from {', '.join(head.channels)}")
    pieces: dict[float, list[_Piece]] = {}
    for path, header in headers.items():
        values = [by_table[path]] * header.total if by_table else _values(path, header, parameter)
        rows: dict[float, list[int]] = {}
        for index, value in enumerate(values):
            if not np.isfinite(value):
                raise UserError(f"{path}: {parameter} of trajectory {index} is {value:g}: give finite values")
            rows.setdefault(same_value(value), []).append(index)
        for value, indices in rows.items():
            pieces.setdefault(value, []).append(_Piece(path, tuple(indices)))
    named = {v: [(str(path.relative_to(folder)), rows) for path, rows in pieces[v]] for v in sorted(pieces)}
    return RegimeFolder(
        tuple(channels) if channels else head.channels,
        head.shape,
        min(header.snapshots for header in headers.values()),
        head.interval,
        fingerprint(content_of(folder, listing, root), [(value, named[value]) for value in named]),
        pieces,
    )


def remember(folder: Path, root: Path) -> None:
    """Keep the hashes of the files that `scan` has read, so that later commands read only files that have changed."""
    remember_content(folder, root)


def _listing(folder: Path) -> Listing:
    if not folder.is_dir():
        raise UserError(f"family.source: {folder} is not a folder: give the folder with your files")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise UserError(f"family.source: {folder} has no files that end with {', '.join(SUFFIXES)}: check the path")
    return {path: (str(path.absolute()), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths}


def _is_well(path: Path) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return "dimensions" in file or "t0_fields" in file
    except OSError:
        return False  # the reader of PDEBench's files says what is wrong


@lru_cache(maxsize=4096)
def _header(name: str, size: int, time: int) -> _Header:
    """Read the first trajectory of a file. The size and time are those by which the cache knows its content."""
    path = Path(name)
    found: Any
    if _is_well(path):
        found = well.read(path, 0, 1)
        parameters = {
            key: [float(value)] * found.total if value.ndim == 0 else value.ravel().tolist()
            for key, value in found.scalars.items()
        }
    else:
        found = pdebench.read(path, 0, 1)
        settings = [flatten(one) for one in pdebench.configs(path)]
        numbers = [{k: float(v) for k, v in one.items() if isinstance(v, (int, float))} for one in settings]
        parameters = {key: [one[key] for one in numbers if key in one] for key in numbers[0]}
    shape = (int(found.fields.shape[-2]), int(found.fields.shape[-1]))
    return _Header(found.channels, shape, found.fields.shape[1], found.interval, found.total, parameters)


def _same(one: _Header, other: _Header, key: str) -> bool:
    if key == "interval":
        return bool(np.isclose(one.interval, other.interval, rtol=1e-3))
    return bool(getattr(one, key) == getattr(other, key))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (" x " if isinstance(value[0], int) else ", ").join(map(str, value))


def _values(path: Path, header: _Header, parameter: str) -> list[float]:
    """The parameter of each trajectory of a file, by its name or the last part of it."""
    names = [name for name in header.parameters if name == parameter or name.endswith(f".{parameter}")]
    if not names:
        known = ", ".join(header.parameters) or "none"
        raise UserError(f"{path} has no parameter {parameter!r} (its parameters: {known}): name one, or give a table")
    if len(names) > 1 and parameter not in names:
        raise UserError(f"{path} has several parameters {parameter!r}: choose from {', '.join(names)}")
    values = header.parameters[parameter if parameter in names else names[0]]
    if len(values) != header.total:
        raise UserError(f"{path} has {len(values)} values of {parameter} for {header.total} trajectories: give a table")
    return values


def _read_table(table: Path, parameter: str, folder: Path, listing: Listing) -> dict[Path, float]:
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"family.table: cannot read {table} ({error}): give a CSV file") from None
    if not rows or not {"file", parameter} <= rows[0].keys():
        raise UserError(f"family.table: {table} needs a first line with the columns file and {parameter}, and rows")
    found: dict[Path, float] = {}
    for number, row in enumerate(rows, start=2):
        path = folder / (row["file"] or "").strip()
        if path not in listing:
            raise UserError(f"family.table: {table}, line {number}: {folder} has no file {row['file']!r}: correct it")
        if path in found:
            raise UserError(f"family.table: {table}, line {number}: {row['file']!r} stands twice: keep one line")
        try:
            found[path] = float(row[parameter])
        except (TypeError, ValueError):
            raise UserError(
                f"family.table: {table}, line {number}: {parameter} is {row[parameter]!r}: give a number"
            ) from None
    if missing := next((path for path in listing if path not in found), None):
        raise UserError(
            f"family.table: {table} has no line for {missing.relative_to(folder)}: add it, or move the file"
        )
    return found
