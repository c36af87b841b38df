"""Refuse a periodic box that is stored with both ends, unless the mapping says so and the values agree."""

from __future__ import annotations

from dataclasses import replace

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import AXES, Mapping
from shodh_moe.data.importing.snapshots import Plan, read_mask, read_velocity
from shodh_moe.data.repeats import has_repeated_end


def require_ends_once(files: ArrayFiles, mapping: Mapping, plan: Plan) -> None:
    """Compare the first and the last plane of each periodic axis in the first, middle and last snapshot.

    Raises:
        UserError: the planes are equal, and ``repeated_end`` does not name the axis; or they differ, and it does.
    """
    if not any(mapping.boundaries.periodic):
        return
    whole = replace(plan, crop=(slice(0, plan.shape[0]), slice(0, plan.shape[1]), slice(0, plan.shape[2])))
    fluid_XYZ = read_mask(files, mapping, whole) < 0.5
    answers: dict[str, list[bool | None]] = {}
    for snapshot in sorted({0, len(plan) // 2, len(plan) - 1}):
        u_3XYZ = read_velocity(files, mapping, whole, snapshot)
        for index, axis in enumerate(AXES):
            if mapping.boundaries.periodic[index] and plan.shape[index] > 2:
                answers.setdefault(axis, []).append(has_repeated_end(u_3XYZ, index, fluid_XYZ))
    repeated = [axis for axis, found in answers.items() if True in found and False not in found]
    if not set(repeated) <= set(mapping.repeated_end):
        raise UserError(
            f"{files}: the last point along {' and '.join(repeated)} repeats the first, but a periodic axis needs each "
            f"point once: write `repeated_end: [{', '.join(repeated)}]` to drop the last"
        )
    for axis, found in answers.items():
        if False in found and axis in mapping.repeated_end:
            raise UserError(
                f"{files}: the last point along {axis} does not repeat the first: take {axis} out of repeated_end"
            )
