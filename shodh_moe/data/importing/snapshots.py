"""Find the snapshots of one trajectory in its files by name, and read them one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
    """The files of a trajectory, of which the most recent few are kept open.

    Attributes:
        paths: the files.
        view: cuts the trajectory out of each array; None if arrays hold one trajectory.
    """

    paths: list[Path]
    view: Callable[[Array], Array] | None = None
    _open: dict[Path, tuple[ArrayFile, ExitStack]] = field(default_factory=dict)

    def at(self, path: Path) -> ArrayFile:
        """Open a file, or return it if it is already open."""
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))[1].close()
            stack = ExitStack()
            opened = stack.enter_context(open_array_file(path))
            self._open[path] = opened.seen_through(self.view) if self.view else opened, stack
        return self._open[path][0]

    def array(self, place: Place) -> Array:
        """Return the array that holds a snapshot."""
        return self.at(place.path).array(place.name)

    def find(self, pattern: str) -> list[tuple[Path, str, str]]:
        """List (file, dataset name, text matched by the wildcards) of each dataset that matches, in natural order.

        Raises:
            UserError: no dataset matches, or what matches is a link.
        """
        parts = re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")))
        fits = parts if "?" not in pattern and "[" not in pattern else re.compile(translate(pattern))
        for path in self.paths:
            for name, what in self.at(path).unusable.items():
                if fits.fullmatch(name) or pattern.startswith(f"{name}/"):
                    raise UserError(f"{path}: {name} is {what}")
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
def open_array_files(paths: list[Path], view: Callable[[Array], Array] | None = None) -> Iterator[ArrayFiles]:
    """Open the files of a trajectory; they are closed at the end of the block."""
    files = ArrayFiles(paths, view)
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
        axes = _stored_axes(mapping.axes, array, len(mapping.components) if dataset == mapping.velocity else 0)
        every += [Place(path, name, time) for time in range(array.shape[axes.index("t")])]
    return every


@dataclass(frozen=True)
class Plan:
    """Locations of all data of one trajectory.

    Attributes:
        velocity: one list of places, or one list per component.
        pressure: places of the pressure; None if it is zero or a component of the velocity's array.
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
    if mapping.pressure not in (None, "zero"):
        fields[str(mapping.pressure)] = places(files, mapping, str(mapping.pressure))
    counts = {name: len(found) for name, found in fields.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(f"{_shown(files.paths)}: found {shown}: every snapshot needs each of them once")
    if not all(counts.values()):
        raise UserError(f"{_shown(files.paths)}: {names[0]} holds no snapshot: its time axis has length 0")
    first = files.array(fields[names[0]][0])
    axes = _stored_axes(mapping.axes, first, len(mapping.components) if "c" in mapping.axes else 0)
    shape = tuple(first.shape[axes.index(axis)] - (mapping.staggered and axis == "x") for axis in AXES)
    for name, found in fields.items():
        array = files.array(found[0])
        axes = _stored_axes(mapping.axes, array, len(mapping.components) if name == mapping.velocity else 0)
        faces = AXES[names.index(name)] if mapping.staggered and name in names else None
        _require_sizes(array, axes, shape, faces)
    crop = mapping.crop if isinstance(mapping.crop, Crop) else Crop()
    cuts = []
    for axis, size in zip(AXES, shape, strict=True):
        low, high = getattr(crop, axis) or (0, size)
        if high > size:
            raise UserError(f"crop.{axis} ends at {high}, but {first.path} has only {size} points there")
        cuts.append(slice(low, high))
    pressure = fields.get(str(mapping.pressure))
    return Plan([fields[name] for name in names], pressure, (shape[0], shape[1], shape[2]), (cuts[0], cuts[1], cuts[2]))


def read_velocity(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of the velocity, cropped but not scaled: [3, X, Y, Z]."""
    if len(plan.velocity) == 3:
        faces: list[str | None] = [*AXES] if mapping.staggered else [None] * 3
        components = zip(plan.velocity, faces, strict=True)
        return np.stack([_read_scalar(files, mapping, plan, one[snapshot], axis) for one, axis in components])
    values_CXYZ = _read_components(files, mapping, plan, snapshot)
    return values_CXYZ[[mapping.components.index(axis) for axis in AXES]]


def read_pressure(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of the pressure, cropped but not scaled: [X, Y, Z]."""
    if plan.pressure is not None:
        return _read_scalar(files, mapping, plan, plan.pressure[snapshot])
    if "p" in mapping.components:
        return _read_components(files, mapping, plan, snapshot)[mapping.components.index("p")]
    return np.zeros([cut.stop - cut.start for cut in plan.crop])


def _read_components(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of all fields in the velocity's array, cropped: [C, X, Y, Z]."""
    place = plan.velocity[0][snapshot]
    array = files.array(place)
    return _cut(array, _stored_axes(mapping.axes, array, len(mapping.components)), plan, place.time)


def _read_scalar(
    files: ArrayFiles, mapping: Mapping, plan: Plan, place: Place, faces: str | None = None
) -> NDArray[np.float64]:
    """Read one snapshot of a scalar, cropped: [X, Y, Z]. A component axis of length 1 in the file is dropped.

    Args:
        faces: the axis on whose faces the values are, which are averaged to the centres; None: they are at the centres.
    """
    array = files.array(place)
    return _cut(array, _stored_axes(mapping.axes, array), plan, place.time, faces)[0]


def read_mask(files: ArrayFiles, mapping: Mapping, plan: Plan) -> NDArray[np.float64]:
    """Read the mask, cropped: 1 in solid voxels, 0 in fluid, [X, Y, Z]; all 0 if the mapping has no mask."""
    if mapping.mask is None:
        return np.zeros([cut.stop - cut.start for cut in plan.crop])
    own = ArrayFiles([Path(mapping.mask.file)], files.view) if mapping.mask.file else files
    try:
        path, name, _ = own.find(mapping.mask.dataset)[0]
        array = own.at(path).array(name)
        # A field that varies with time serves as a mask through its first snapshot, if it marks solids as missing.
        varies = mapping.mask.solid == "missing" and len(array.shape) == len(
            [axis for axis in mapping.axes if axis != "c"]
        )
        axes = _stored_axes([axis for axis in mapping.axes if axis != "t" or varies], array)
        values_XYZ = _cut(array, axes, plan, 0 if "t" in axes else None)[0]
    finally:
        if own is not files:
            own.close()
    missing_XYZ, solid = ~np.isfinite(values_XYZ), mapping.mask.solid
    if solid == "values" and missing_XYZ.any():
        raise UserError(
            f"{path}: the mask {name} has {missing_XYZ.sum()} values that are missing or not finite: if these mark the "
            "solids, set mask.solid to missing, or to both if 0 and 1 count, too"
        )
    solid_XYZ = missing_XYZ if solid == "missing" else ((values_XYZ > 0.5) != mapping.mask.inverted) | missing_XYZ
    return solid_XYZ.astype(np.float64)


def _stored_axes(axes: Sequence[str], array: Array, components: int = 0) -> list[str]:
    """Return the axes of an array after checking its shape.

    Args:
        components: expected length of the component axis; 0 for a scalar, which has no such axis, or one of length 1.
    """
    stored = list(axes)
    if not components and "c" in stored and len(array.shape) == len(stored) - 1:
        stored.remove("c")
    if len(array.shape) != len(stored):
        wanted = stored if components else [axis for axis in axes if axis != "c"]
        raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes {_axes(wanted)}")
    found = array.shape[stored.index("c")] if "c" in stored else 1
    if found != (components or 1):
        raise UserError(
            f"{array.path}: {array.name} has shape {array.shape}, expected {components or 1} along c of {_axes(stored)}"
            + ("; if it holds more than the velocity, say what in `components`" if found > components > 0 else "")
        )
    return stored


def _require_sizes(array: Array, axes: Sequence[str], shape: Sequence[int], faces: str | None) -> None:
    """Raise `UserError` unless an array has the points of the grid, with one more along the axis of its ``faces``."""
    sizes = [array.shape[axes.index(axis)] for axis in AXES]
    wanted = [size + (axis == faces) for axis, size in zip(AXES, shape, strict=True)]
    if sizes != wanted:
        apart = max(abs(one - other) for one, other in zip(sizes, wanted, strict=True))
        hint = "; if components are stored on the faces of the cells, set `staggered: true`"
        raise UserError(
            f"{array.path}: {array.name} has {dict(zip(axes, array.shape, strict=True))}, expected x, y, z = {wanted}"
            + (hint if apart == 1 and not faces else "")
        )


def _cut(
    array: Array, axes: Sequence[str], plan: Plan, time: int | None, faces: str | None = None
) -> NDArray[np.float64]:
    """Read the cropped box as [C, X, Y, Z]; values on the faces along an axis are averaged to the cells' centres."""
    _require_sizes(array, axes, plan.shape, faces)
    parts = {axis: slice(cut.start, cut.stop + (axis == faces)) for axis, cut in zip(AXES, plan.crop, strict=True)}
    index = tuple(parts.get(axis, time if axis == "t" and time is not None else slice(None)) for axis in axes)
    values = array.read(index)
    left = [axis for axis in axes if axis != "t"]
    if "c" not in left:
        values, left = values[..., None], [*left, "c"]
    values_CXYZ = np.ascontiguousarray(values.transpose([left.index(axis) for axis in ("c", *AXES)]))
    if faces:
        at = 1 + AXES.index(faces)
        low, high = (np.take(values_CXYZ, range(first, values_CXYZ.shape[at] - 1 + first), at) for first in (0, 1))
        return (low + high) / 2
    return values_CXYZ


def _axes(axes: Sequence[str]) -> str:
    return f"[{', '.join(axes)}]"


def _shown(paths: list[Path]) -> str:
    return str(paths[0]) + (f" (and {len(paths) - 1} more files)" if len(paths) > 1 else "")
