"""Put the snapshots of a trajectory in order: by the times that the files hold, otherwise by the numbers in names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.array_files import Array
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import Mapping
from shodh_moe.data.importing.order import by_numbers

# Names of datasets and attributes with the times of snapshots, if the mapping names none.
_TIME = ("time", "times", "t")


@dataclass(frozen=True)
class Place:
    """Location of one snapshot of one field.

    Attributes:
        path, name: the file, and the array in it.
        time: index along the array's time axis; None if it has none.
    """

    path: Path
    name: str
    time: int | None

    def __str__(self) -> str:
        return f"{self.name}{'' if self.time is None else f'[{self.time}]'} of {self.path}"


def in_order(
    files: ArrayFiles, mapping: Mapping, fields: Sequence[str]
) -> tuple[dict[str, list[Place]], NDArray[np.float64] | None]:
    """List the places of all snapshots of each field, in the order of time.

    Returns:
        The places by field, and the times of the snapshots as stored; None if the files hold no times.

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
    own = {field: _own_times(files, mapping.time, stored[field]) for field in fields}
    timed = next((field for field in fields if own[field] is not None), None)
    if timed is None:
        ordered = {field: _by_names(files, found[field], stored[field]) for field in fields}
        return ordered, _times_apart(files, mapping.time, counts[fields[0]])
    ordered, times_T = {}, np.sort(np.asarray(own[timed]))
    for field in fields:
        times = own[field]
        if times is None:
            ordered[field] = _by_names(files, found[field], stored[field])
            continue
        places = [place for one in stored[field] for place in one]
        ordered[field] = [places[index] for index in np.argsort(times, kind="stable")]
        _require_distinct(ordered[field], np.sort(times))
        rounding = 2 * float(np.finfo(np.float32).eps) * float(np.abs(times_T).max())
        if (np.abs(np.sort(times) - times_T) > 1e-3 * np.diff(times_T).min(initial=1.0) + rounding).any():
            raise UserError(f"{files}: {field} and {timed} are not stored at the same times: correct the times")
    if any(own[field] is None for field in fields) and ordered[timed] != _by_names(files, found[timed], stored[timed]):
        (bare, *_) = [field for field in fields if own[field] is None]
        raise UserError(
            f"{files}: the names of {timed} are not in the order of their times, and {bare} has no times of its own: "
            "store the times in its files as well"
        )
    return ordered, times_T


def _places_of(files: ArrayFiles, mapping: Mapping, field: str, found: tuple[Path, str]) -> list[Place]:
    """List the snapshots in one array."""
    if "t" not in mapping.axes:
        return [Place(*found, None)]
    array = files.array(*found)
    axes = stored_axes(mapping.axes, array, len(mapping.components) if field == mapping.velocity else 0)
    return [Place(*found, time) for time in range(array.shape[axes.index("t")])]


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


def _own_times(files: ArrayFiles, time: str | None, stored: list[list[Place]]) -> NDArray[np.float64] | None:
    """Return the times of a field's snapshots from the files that hold them; None if not all of these have times."""
    places = [place for places in stored for place in places]
    parts = []
    for path, group in groupby(places, key=attrgetter("path")):
        times = _unnamed_times(files, list(group)) if time is None else _numbers(files, path, files.names(path, time))
        parts.append(times)
    if any(times is None for times in parts):
        return None
    times_T = np.concatenate(parts)
    # Times that the mapping does not name and that are all equal were never set.
    unset = time is None and len(times_T) > 1 and not np.ptp(times_T)
    return None if unset or len(times_T) != len(places) else times_T


def _unnamed_times(files: ArrayFiles, places: list[Place]) -> NDArray[np.float64] | None:
    """Return times of snapshots of one file that it holds as datasets or attributes with the usual names."""
    path, file = places[0].path, files.at(places[0].path)
    folders = [(folder, list(group)) for folder, group in groupby(places, key=lambda place: _folder(place.name))]
    parts = []
    for folder, group in folders:
        within = {"", folder} if len(folders) == 1 else {folder}
        stated = [_time_attribute(file.array(place.name).attributes) for place in group if place.time is None]
        of_file = [_time_attribute(file.attributes)] if len(places) == 1 else []
        datasets = [name for name in file.names if name.split("/")[-1].lower() in _TIME and _folder(name) in within]
        candidates = [np.concatenate([*stated, []]), *of_file, *(_numbers(files, path, [name]) for name in datasets)]
        fitting = [one for one in candidates if len(one) == len(group)]
        if not fitting:
            return None
        parts.append(fitting[0])
    return np.concatenate(parts)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _time_attribute(attributes: dict[str, Any]) -> NDArray[np.float64]:
    """Return the time that attributes state, [1], or [0] if they state none."""
    for key in _TIME:
        value = np.ravel(attributes.get(key, []))
        if value.size == 1 and value.dtype.kind in "iuf" and np.isfinite(value[0]):
            return value.astype(np.float64)
    return np.empty(0)


def _numbers(files: ArrayFiles, path: Path, names: list[str]) -> NDArray[np.float64]:
    """Return the values of 1D datasets one after the other; a dataset of text or of more axes has none."""
    found = [np.empty(0)]
    for name in names:
        with suppress(UserError):
            array = files.array(path, name)
            if len(array.shape) < 2 or np.prod(array.shape) == max(array.shape):
                found.append(np.ravel(array.read(tuple(slice(None) for _ in array.shape))))
    return np.concatenate(found)


def _times_apart(files: ArrayFiles, time: str | None, count: int) -> NDArray[np.float64] | None:
    """Return the times of the dataset that the mapping names, if it is in other files than the fields."""
    if time is None:
        return None
    times = np.concatenate([_numbers(files, path, files.names(path, time)) for path in files.paths])
    if len(times) == count + 1:
        times = times[:-1]  # PDEBench stores the end of the last interval as well
    if len(times) != count:
        files.find(time)  # refuses a name that no dataset has
        raise UserError(f"{files}: {time} has {len(times)} times for {count} snapshots")
    return times


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


def stored_axes(axes: Sequence[str], array: Array, components: int = 0) -> list[str]:
    """Return the axes of an array after checking its shape.

    Args:
        components: expected length of the component axis; 0 for a scalar, which has no such axis, or one of length 1.
    """
    stored = list(axes)
    if not components and "c" in stored and len(array.shape) == len(stored) - 1:
        stored.remove("c")
    if len(array.shape) != len(stored):
        wanted = stored if components else [axis for axis in axes if axis != "c"]
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes {_shown(wanted)}")
    found = array.shape[stored.index("c")] if "c" in stored else 1
    wanted_length = components or 1
    if found != wanted_length:
        raise UserError(
            f"{array.path}: {array.name} has shape {array.shape}, expected {wanted_length} along c of {_shown(stored)}"
            + ("; if it holds more than the velocity, say what in `components`" if found > components > 0 else "")
        )
    return stored


def _shown(axes: Sequence[str]) -> str:
    return f"[{', '.join(axes)}]"
