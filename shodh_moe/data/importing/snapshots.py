"""Find the snapshots of one trajectory in its files by name, and read them one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.array_files import Array, ArrayFile, open_array_file
from shodh_moe.data.importing.mapping import AXES, Crop, Mapping

_MOST_OPEN = 8


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


@dataclass
class ArrayFiles:
    """The files of a trajectory, of which the most recent few are kept open."""

    paths: list[Path]
    _open: dict[Path, tuple[ArrayFile, ExitStack]] = field(default_factory=dict)

    def at(self, path: Path) -> ArrayFile:
        """Open a file, or return it if it is already open."""
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))[1].close()
            stack = ExitStack()
            self._open[path] = stack.enter_context(open_array_file(path)), stack
        return self._open[path][0]

    def array(self, place: Place) -> Array:
        """Return the array that holds a snapshot."""
        return self.at(place.path).array(place.name)

    def find(self, pattern: str) -> list[tuple[Path, str, str]]:
        """List (file, dataset name, text matched by the wildcards) of each dataset that matches, in natural order.

        Raises:
            UserError: no dataset matches.
        """
        parts = re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")))
        fits = parts if "?" not in pattern and "[" not in pattern else re.compile(translate(pattern))
        found = [
            (path, name, "".join(match.groups()))
            for path in self.paths
            for name in self.at(path).names
            if (match := fits.fullmatch(name))
        ]
        if not found:
            names = sorted({name for path in self.paths[:2] for name in self.at(path).names})
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"{_shown(self.paths)} has no dataset {pattern!r}; it has {shown or 'none'}")
        return sorted(found, key=lambda one: natural(one[2])) if "*" in pattern else found

    def close(self) -> None:
        """Close all open files."""
        while self._open:
            self._open.popitem()[1][1].close()


@contextmanager
def open_array_files(paths: list[Path]) -> Iterator[ArrayFiles]:
    """Open the files of a trajectory; they are closed at the end of the block."""
    files = ArrayFiles(paths)
    try:
        yield files
    finally:
        files.close()


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key that orders the numbers in a text by value: 9 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def places(files: ArrayFiles, mapping: Mapping, dataset: str) -> list[Place]:
    """List the locations of all snapshots of a field: along a time axis, in numbered datasets, or in one file each."""
    found = files.find(dataset)
    if "t" not in mapping.axes:
        return [Place(path, name, None) for path, name, _ in found]
    every = []
    for path, name, _ in found:
        array = files.at(path).array(name)
        axes = _stored_axes(mapping.axes, array, dataset == mapping.velocity)
        every += [Place(path, name, time) for time in range(array.shape[axes.index("t")])]
    return every


@dataclass(frozen=True)
class Plan:
    """Locations of all data of one trajectory.

    Attributes:
        velocity: one list of places, or one list per component.
        pressure: places of the pressure; None if it is zero.
        shape: number of grid points (X, Y, Z) in the files.
        crop: the grid points to import along each axis.
    """

    velocity: list[list[Place]]
    pressure: list[Place] | None
    shape: tuple[int, int, int]
    crop: tuple[slice, slice, slice]

    def __len__(self) -> int:
        return len(self.velocity[0])


def plan(files: ArrayFiles, mapping: Mapping) -> Plan:
    """Find all snapshots of a trajectory.

    Raises:
        UserError: a dataset is missing, its shape does not fit the axes, or fields have different numbers of snapshots.
    """
    names = [mapping.velocity] if isinstance(mapping.velocity, str) else mapping.velocity
    fields = {name: places(files, mapping, name) for name in names}
    if mapping.pressure != "zero":
        fields[str(mapping.pressure)] = places(files, mapping, str(mapping.pressure))
    counts = {name: len(found) for name, found in fields.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(f"{_shown(files.paths)}: found {shown}: every snapshot needs each of them once")
    first = files.array(fields[names[0]][0])
    axes = _stored_axes(mapping.axes, first, "c" in mapping.axes)
    shape = tuple(first.shape[axes.index(axis)] for axis in AXES)
    crop = mapping.crop if isinstance(mapping.crop, Crop) else Crop()
    cuts = []
    for axis, size in zip(AXES, shape, strict=True):
        low, high = getattr(crop, axis) or (0, size)
        if high > size:
            raise UserError(f"crop.{axis} ends at {high}, but {first.path} has only {size} points there")
        cuts.append(slice(low, high))
    pressure = None if mapping.pressure == "zero" else fields[str(mapping.pressure)]
    return Plan([fields[name] for name in names], pressure, (shape[0], shape[1], shape[2]), (cuts[0], cuts[1], cuts[2]))


def read_velocity(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of the velocity, cropped but not scaled: [3, X, Y, Z]."""
    if len(plan.velocity) == 3:
        return np.stack([read_scalar(files, mapping, plan, one[snapshot]) for one in plan.velocity])
    place = plan.velocity[0][snapshot]
    array = files.array(place)
    axes = _stored_axes(mapping.axes, array, True)
    values_CXYZ = _cut(array, axes, plan, place.time)
    order: list[str] = list(mapping.components)
    return values_CXYZ[[order.index(axis) for axis in AXES]]


def read_scalar(files: ArrayFiles, mapping: Mapping, plan: Plan, place: Place) -> NDArray[np.float64]:
    """Read one snapshot of a scalar, cropped: [X, Y, Z]. A component axis of length 1 in the file is dropped."""
    array = files.array(place)
    return _cut(array, _stored_axes(mapping.axes, array, False), plan, place.time)[0]


def read_mask(files: ArrayFiles, mapping: Mapping, plan: Plan) -> NDArray[np.float64]:
    """Read the mask, cropped: 1 in solid voxels, 0 in fluid, [X, Y, Z]; all 0 if the mapping has no mask."""
    if mapping.mask is None:
        return np.zeros([cut.stop - cut.start for cut in plan.crop])
    own = ArrayFiles([Path(mapping.mask.file)]) if mapping.mask.file else files
    try:
        path, name, _ = own.find(mapping.mask.dataset)[0]
        array = own.at(path).array(name)
        axes = _stored_axes([axis for axis in mapping.axes if axis != "t"], array, False)
        values_XYZ = _cut(array, axes, plan, None)[0]
    finally:
        if own is not files:
            own.close()
    if not np.isfinite(values_XYZ).all():
        raise UserError(f"{path}: the mask {name} has values that are not finite, expected 0 and 1")
    solid_XYZ = (values_XYZ > 0.5) != mapping.mask.inverted
    return solid_XYZ.astype(np.float64)


def _stored_axes(axes: Sequence[str], array: Array, vector: bool) -> list[str]:
    """Return the axes of an array after checking its shape: a scalar has no component axis, or one of length 1."""
    stored = list(axes)
    if not vector and "c" in stored and len(array.shape) == len(stored) - 1:
        stored.remove("c")
    fits = len(array.shape) == len(stored) and (vector or "c" not in stored or array.shape[stored.index("c")] == 1)
    if not fits:
        wanted = stored if vector else [axis for axis in axes if axis != "c"]
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes {_axes(wanted)}")
    if vector and "c" in stored and array.shape[stored.index("c")] != 3:
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected 3 along c of {_axes(stored)}")
    return stored


def _cut(array: Array, axes: Sequence[str], plan: Plan, time: int | None) -> NDArray[np.float64]:
    """Read the cropped box as [C, X, Y, Z]."""
    for axis, size in zip(AXES, plan.shape, strict=True):
        if array.shape[axes.index(axis)] != size:
            found = dict(zip(axes, array.shape, strict=True))
            raise UserError(f"{array.path}: {array.name} has {found}, expected x, y, z = {list(plan.shape)}")
    parts = dict(zip(AXES, plan.crop, strict=True))
    index = tuple(parts.get(axis, time if axis == "t" and time is not None else slice(None)) for axis in axes)
    values = array.read(index)
    left = [axis for axis in axes if axis != "t"]
    if "c" not in left:
        values, left = values[..., None], [*left, "c"]
    return np.ascontiguousarray(values.transpose([left.index(axis) for axis in ("c", *AXES)]))


def _axes(axes: Sequence[str]) -> str:
    return f"[{', '.join(axes)}]"


def _shown(paths: list[Path]) -> str:
    return str(paths[0]) + (f" (and {len(paths) - 1} more files)" if len(paths) > 1 else "")
