"""Put the snapshots of a trajectory in order: by the times that the files hold, otherwise by the numbers in names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.axes import stored_axes
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import Mapping
from shodh_moe.data.importing.order import by_numbers
from shodh_moe.data.importing.times import Place, Times, own_times, times_apart

_MOST_SNAPSHOTS = 10_000_000  # in one array


def in_order(files: ArrayFiles, mapping: Mapping, fields: Sequence[str]) -> tuple[dict[str, list[Place]], Times | None]:
    """List the places of all snapshots of each field, in the order of time.

    Returns:
        The places by field, and the times of the snapshots; None if the files hold no times.

    Raises:
        UserError: a dataset is missing, fields have different numbers of snapshots, names have no clear order, or times
            are equal or differ between fields.
    """
    found = {field: files.find(field) for field in fields}
    stored = {field: [_places_of(files, mapping, field, one) for one in found[field]] for field in fields}
    counts = {field: sum(map(len, places)) for field, places in stored.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {field}" for field, count in counts.items())
        raise UserError(f"{files}: found {shown}: every snapshot needs each of them once")
    if not all(counts.values()):
        raise UserError(f"{files}: {fields[0]} holds no snapshot: its time axis has length 0")
    own = {field: own_times(files, mapping.time, stored[field]) for field in fields}
    with_times = [(field, times) for field, times in own.items() if times is not None]
    if not with_times:
        ordered = {field: _by_names(files, found[field], stored[field]) for field in fields}
        return ordered, times_apart(files, mapping.time, counts[fields[0]])
    timed, reference = with_times[0][0], with_times[0][1].in_order()
    ordered = {}
    for field in fields:
        times = own[field]
        if times is None:
            ordered[field] = _by_names(files, found[field], stored[field])
            continue
        places = [place for one in stored[field] for place in one]
        ordered[field] = [places[index] for index in np.argsort(times.values, kind="stable")]
        _require_distinct(ordered[field], times.in_order().values)
        _require_same(files, field, times.in_order().values, timed, reference.values)
    if any(own[field] is None for field in fields) and ordered[timed] != _by_names(files, found[timed], stored[timed]):
        (bare, *_) = [field for field in fields if own[field] is None]
        raise UserError(
            f"{files}: the names of {timed} are not in the order of their times, and {bare} has no times of its own: "
            "store the times in its files as well"
        )
    return ordered, reference


def _places_of(files: ArrayFiles, mapping: Mapping, field: str, found: tuple[Path, str]) -> list[Place]:
    """List the snapshots in one array."""
    if "t" not in mapping.axes:
        return [Place(*found, None)]
    array = files.array(*found)
    axes = stored_axes(mapping.axes, array, len(mapping.components) if field == mapping.velocity else 0)
    count = array.shape[axes.index("t")]
    if count > _MOST_SNAPSHOTS:
        raise UserError(f"{array.path}: {array.name} claims {count} snapshots, which is damage: copy the file again")
    return [Place(*found, time) for time in range(count)]


def _by_names(files: ArrayFiles, found: list[tuple[Path, str]], stored: list[list[Place]]) -> list[Place]:
    """Order the snapshots by the numbers in the names of datasets; if these are all the same, in the names of files."""
    names = [name for _, name in found]
    paths = [path for path, _ in found]
    if len(set(names)) == len(names):
        remedy = f"rename these datasets of {files}, or use a pattern that matches only some of them"
        order = by_numbers(names, remedy)
    elif len(set(paths)) == len(paths):
        index_of = {path: index for index, path in enumerate(paths)}
        order = []
        for entry in files.entries:
            within = [path for path in entry if path in index_of]
            remedy = "name these files one by one, in the order of time"
            order += [index_of[within[index]] for index in by_numbers([str(path) for path in within], remedy)]
    else:
        name, _ = Counter(names).most_common(1)[0]
        one, other = [path for path, found_name in found if found_name == name][:2]
        raise UserError(
            f"{one} and {other} both hold {name}, so the order of the snapshots is open: if these files are "
            "trajectories of their own, do not name them in one list; otherwise name the dataset of times with `time`"
        )
    return [place for index in order for place in stored[index]]


def _require_distinct(places: list[Place], times: NDArray[np.float64]) -> None:
    """Refuse two snapshots of a field at the same time; both are in the order of time."""
    if not np.isfinite(times).all():
        raise UserError(f"{places[0].path}: the times of the snapshots are not all finite: correct them")
    for index in np.flatnonzero(np.diff(times) <= 0):
        one, other = places[index], places[index + 1]
        raise UserError(
            f"{one} and {other} are both at time {times[index]:g}: if their files are trajectories of their own, do "
            "not name them in one list; otherwise remove one"
        )


def _require_same(
    files: ArrayFiles, field: str, times: NDArray[np.float64], other: str, others: NDArray[np.float64]
) -> None:
    """Refuse two fields whose snapshots are at different times."""
    rounding = 2 * float(np.finfo(np.float32).eps) * float(np.abs(others).max())
    if (np.abs(times - others) > 1e-3 * np.diff(others).min(initial=1.0) + rounding).any():
        raise UserError(f"{files}: {field} and {other} are not stored at the same times: correct the times")
