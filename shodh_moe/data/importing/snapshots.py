"""Plan the import of one trajectory, and read its snapshots one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.array_files import Array
from shodh_moe.data.importing.axes import stored_axes
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import AXES, Crop, Mapping
from shodh_moe.data.importing.sequence import in_order
from shodh_moe.data.importing.times import Place, Times


@dataclass(frozen=True)
class Plan:
    """Locations of all data of one trajectory.

    Attributes:
        velocity: one list of places, or one list per component.
        pressure: places of the pressure; None if it is zero.
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
    pressure = None if mapping.pressure == "zero" else str(mapping.pressure)
    fields, times = in_order(files, mapping, [*names, *([pressure] if pressure else [])])
    first = files.array(fields[names[0]][0].path, fields[names[0]][0].name)
    axes = stored_axes(mapping.axes, first, "c" in mapping.axes)
    shape = tuple(first.shape[axes.index(axis)] for axis in AXES)
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


def read_velocity(files: ArrayFiles, mapping: Mapping, plan: Plan, snapshot: int) -> NDArray[np.float64]:
    """Read one snapshot of the velocity, cropped but not scaled: [3, X, Y, Z]."""
    if len(plan.velocity) == 3:
        return np.stack([read_scalar(files, mapping, plan, one[snapshot]) for one in plan.velocity])
    place = plan.velocity[0][snapshot]
    array = files.array(place.path, place.name)
    axes = stored_axes(mapping.axes, array, True)
    values_CXYZ = _cut(array, axes, plan, place.time)
    order: list[str] = list(mapping.components)
    return values_CXYZ[[order.index(axis) for axis in AXES]]


def read_scalar(files: ArrayFiles, mapping: Mapping, plan: Plan, place: Place) -> NDArray[np.float64]:
    """Read one snapshot of a scalar, cropped: [X, Y, Z]. A component axis of length 1 in the file is dropped."""
    array = files.array(place.path, place.name)
    return _cut(array, stored_axes(mapping.axes, array, False), plan, place.time)[0]


def read_mask(files: ArrayFiles, mapping: Mapping, plan: Plan) -> NDArray[np.float64]:
    """Read the mask, cropped: 1 in solid voxels, 0 in fluid, [X, Y, Z]; all 0 if the mapping has no mask."""
    if mapping.mask is None:
        return np.zeros([cut.stop - cut.start for cut in plan.crop])
    own = ArrayFiles([[Path(mapping.mask.file)]]) if mapping.mask.file else files
    try:
        path, name = own.find(mapping.mask.dataset)[0]
        array = own.at(path).array(name)
        axes = stored_axes([axis for axis in mapping.axes if axis != "t"], array, False)
        values_XYZ = _cut(array, axes, plan, None)[0]
    finally:
        if own is not files:
            own.close()
    if not np.isfinite(values_XYZ).all():
        raise UserError(f"{path}: the mask {name} has values that are not finite, expected 0 and 1")
    solid_XYZ = (values_XYZ > 0.5) != mapping.mask.inverted
    return solid_XYZ.astype(np.float64)


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
