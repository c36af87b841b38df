"""Find the times of the snapshots: in datasets that the mapping names, or in those and attributes of usual names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.units import unit_of
from shodh_moe.formats import Array

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


@dataclass(frozen=True)
class Times:
    """Times of snapshots as stored, before scaling.

    Attributes:
        values: one for each snapshot.
        array: a dataset that holds some of them and states their unit; None if attributes hold them.
    """

    values: NDArray[np.float64]
    array: Array | None = None

    @staticmethod
    def joined(parts: Sequence[Times]) -> Times:
        """Return the times of several datasets or attributes, one after the other.

        Raises:
            UserError: datasets state different units, such as ``hours since`` different days.
        """
        by_unit = {unit_of(array): array for part in parts for array in [part.array] if array}
        if len(by_unit) > 1:
            (unit, array), (other_unit, other), *_ = by_unit.items()
            raise UserError(
                f"{array.name} of {array.path} is in {unit!r}, but {other.name} of {other.path} in {other_unit!r}: "
                "convert the times to one unit and origin"
            )
        return Times(
            np.concatenate([np.empty(0), *(part.values for part in parts)]), next(iter(by_unit.values()), None)
        )

    def in_order(self) -> Times:
        return Times(np.sort(self.values), self.array)


def own_times(files: ArrayFiles, time: str | None, stored: list[list[Place]]) -> Times | None:
    """Return the times of a field's snapshots from the files that hold them; None if not all of these have times."""
    places = [place for places in stored for place in places]
    parts = []
    for path, grouped in groupby(places, key=attrgetter("path")):
        group = list(grouped)
        times = _unnamed_times(files, group) if time is None else _times_in(files, path, files.names(path, time))
        if times is None or len(times.values) != len(group):
            return None
        parts.append(times)
    every = Times.joined(parts)
    # Times that the mapping does not name and that are all equal were never set.
    unset = time is None and len(every.values) > 1 and not np.ptp(every.values)
    return None if unset else every


def _unnamed_times(files: ArrayFiles, places: list[Place]) -> Times | None:
    """Return times of snapshots of one file that it holds as datasets or attributes with the usual names."""
    path, file = places[0].path, files.at(places[0].path)
    folders = [(folder, list(group)) for folder, group in groupby(places, key=lambda place: _folder(place.name))]
    parts = []
    for folder, group in folders:
        within = {"", folder} if len(folders) == 1 else {folder}
        stated = [_time_of(file.array(place.name)) for place in group if place.time is None]
        of_file = [_time_attribute(file.attributes)] if len(places) == 1 else []
        datasets = [name for name in file.names if name.split("/")[-1].lower() in _TIME and _folder(name) in within]
        candidates = [Times.joined(stated), *of_file]
        for name in datasets:
            with suppress(UserError):  # text, or damaged
                candidates.append(_times_in(files, path, [name]))
        fitting = [one for one in candidates if len(one.values) == len(group)]
        if not fitting:
            return None
        parts.append(fitting[0])
    return Times.joined(parts)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _time_of(array: Array) -> Times:
    """Return the time that attributes of an array state, with its unit if they state that."""
    times, unit = _time_attribute(array.attributes), array.attributes.get("time_unit")
    return Times(times.values, replace(array, attributes={"units": unit})) if unit and len(times.values) else times


def _time_attribute(attributes: dict[str, Any]) -> Times:
    """Return the time that attributes state, or no times if they state none."""
    for key in _TIME:
        value = np.ravel(attributes.get(key, []))
        if value.size == 1 and value.dtype.kind in "iuf" and np.isfinite(value[0]):
            return Times(value.astype(np.float64))
    return Times(np.empty(0))


def _times_in(files: ArrayFiles, path: Path, names: list[str]) -> Times:
    """Return the values of 1D datasets of a file, one after the other; a dataset of more axes has none."""
    found = []
    for name in names:
        array = files.array(path, name)
        if len(array.shape) < 2 or np.prod(array.shape) == max(array.shape):
            values = np.ravel(array.read(tuple(slice(None) for _ in array.shape)))
            found.append(Times(values, array))
    return Times.joined(found)


def times_apart(files: ArrayFiles, time: str | None, count: int) -> Times | None:
    """Return the times of the dataset that the mapping names, if it is in other files than the fields."""
    if time is None:
        return None
    times = Times.joined([_times_in(files, path, files.names(path, time)) for path in files.paths])
    if len(times.values) == count + 1:
        times = Times(times.values[:-1], times.array)  # PDEBench stores the end of the last interval as well
    if len(times.values) != count:
        files.find(time)  # refuses a name that no dataset has
        raise UserError(f"{files}: {time} has {len(times.values)} times for {count} snapshots")
    return times
