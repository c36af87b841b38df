"""Plan the import of one trajectory, and read its snapshots one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.axes import stored_axes
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import AXES, Crop, Mapping
from shodh_moe.data.importing.sequence import in_order
from shodh_moe.data.importing.times import Place, Times
from shodh_moe.formats import Array


@dataclass(frozen=True)
class Plan:
    """Locations of all data of one trajectory.

    Attributes:
        velocity: one list of places, or one list per component.
        pressure: places of the pressure; None if it is zero or a component of the velocity's array.
        shape: number of grid points (X, Y, Z) in the files.
        crop: the grid points to import along each axis.
        times: times of the snapshots; None if the files hold none.
    """

    velocity: list[list[Place]]
    pressure: list[Place] | None
    shape: tuple[int, int, int]
    crop: tuple[slice, slice, slice]
    times: Times | None

    def __len__(self) -> int:
        return len(self.velocity[0])


def plan(files: ArrayFiles, mapping: Mapping) -> Plan:
    """Find all snapshots of a trajectory.

    Raises:
        UserError: as in `in_order`, a shape does not fit the axes, or a crop exceeds the grid.
    """
    names = [mapping.velocity] if isinstance(mapping.velocity, str) else mapping.velocity
    pressure = None if mapping.pressure in (None, "zero") else str(mapping.pressure)
    fields, times = in_order(files, mapping, [*names, *([pressure] if pressure else [])])
    _require_all_used(files, mapping, fields)
    first = files.array(fields[names[0]][0].path, fields[names[0]][0].name)
    axes = stored_axes(mapping.axes, first, len(mapping.components) if "c" in mapping.axes else 0)
    shape = tuple(first.shape[axes.index(axis)] - (mapping.staggered and axis == "x") for axis in AXES)
    for name, found in fields.items():
        array = files.array(found[0].path, found[0].name)
        axes = stored_axes(mapping.axes, array, len(mapping.components) if name == mapping.velocity else 0)
        faces = AXES[names.index(name)] if mapping.staggered and name in names else None
        _require_sizes(array, axes, shape, faces)
    crop = mapping.crop if isinstance(mapping.crop, Crop) else Crop()
    cuts = []
    for axis, size in zip(AXES, shape, strict=True):
        low, high = getattr(crop, axis) or (0, size - (axis in mapping.repeated_end))
        if high > size:
            raise UserError(f"crop.{axis} ends at {high}, but {first.path} has only {size} points there")
        cuts.append(slice(low, high))
    return Plan(
        [fields[name] for name in names],
        fields[pressure] if pressure else None,
        (shape[0], shape[1], shape[2]),
        (cuts[0], cuts[1], cuts[2]),
        times,
    )


def _require_all_used(files: ArrayFiles, mapping: Mapping, fields: dict[str, list[Place]]) -> None:
    """Refuse a file that holds nothing of what the mapping names: its snapshots would be missing without a word."""
    used = {place.path for places in fields.values() for place in places}
    others = [mapping.time] if mapping.time else []
    others += [name for _, name in mapping.coordinates] if mapping.coordinates else []
    others += [mapping.mask.dataset] if mapping.mask and not mapping.mask.file else []
    for path in files.paths:
        if path not in used and not any(files.names(path, name) for name in others):
            shown = ", ".join(files.at(path).names[:12]) or "none"
            raise UserError(
                f"{path} holds no dataset {' or '.join(fields)}; it has {shown}: leave it out of the list, or copy it "
                "again"
            )


def read_velocity(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of the velocity, cropped but not scaled: [3, X, Y, Z]."""
    if len(plan.velocity) == 3:
        faces: list[str | None] = [*AXES] if mapping.staggered else [None] * 3
        components = zip(plan.velocity, faces, strict=True)
        return np.stack([_read_scalar(files, mapping, plan, one[snapshot], axis) for one, axis in components])
    values_CXYZ = _read_components(files, mapping, plan, snapshot)
    order: list[str] = list(mapping.components)
    return values_CXYZ[[order.index(axis) for axis in AXES]]


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
    array = files.array(place.path, place.name)
    return _cut(array, stored_axes(mapping.axes, array, len(mapping.components)), plan, place.time)


def _read_scalar(
    files: ArrayFiles, mapping: Mapping, plan: Plan, place: Place, faces: str | None = None
) -> NDArray[np.float64]:
    """Read one snapshot of a scalar, cropped: [X, Y, Z]. A component axis of length 1 in the file is dropped.

    Args:
        faces: the axis on whose faces the values are, which are averaged to the centres; None: they are at the centres.
    """
    array = files.array(place.path, place.name)
    return _cut(array, stored_axes(mapping.axes, array), plan, place.time, faces)[0]


def read_mask(files: ArrayFiles, mapping: Mapping, plan: Plan) -> NDArray[np.float64]:
    """Read the mask, cropped: 1 in solid voxels, 0 in fluid, [X, Y, Z]; all 0 if the mapping has no mask."""
    if mapping.mask is None:
        return np.zeros([cut.stop - cut.start for cut in plan.crop])
    own = ArrayFiles([[Path(mapping.mask.file)]], files.view) if mapping.mask.file else files
    try:
        path, name = own.find(mapping.mask.dataset)[0]
        array = own.at(path).array(name)
        # A field that varies with time serves as a mask through its first snapshot, if it marks solids as missing.
        varies = mapping.mask.solid == "missing" and len(array.shape) == len(
            [axis for axis in mapping.axes if axis != "c"]
        )
        axes = stored_axes([axis for axis in mapping.axes if axis != "t" or varies], array)
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
