"""The constant time step of a trajectory, from the times in its files or from the mapping."""

from __future__ import annotations

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.coordinates import UNEVEN, even_step
from shodh_moe.data.importing.file_set import ArrayFiles
from shodh_moe.data.importing.mapping import Mapping
from shodh_moe.data.importing.order import largest_gap
from shodh_moe.data.importing.snapshots import Plan
from shodh_moe.data.importing.times import Times


def start_and_step(
    files: ArrayFiles, mapping: Mapping, times: Times | None, factor: float, start: int, stop: int
) -> tuple[float, float]:
    """Return the time of the first snapshot and the time step, after scaling.

    Args:
        factor: by which the times in the files are multiplied.

    Raises:
        UserError: the times of the snapshots from ``start`` to ``stop`` - 1 are uneven, or contradict ``time_step``.
    """
    given = mapping.time_step and mapping.time_step * mapping.scale.time
    if times is None:
        return start * float(given or 0), float(given or 0)
    values = times.values[start:stop] * factor
    step = even_step(values)
    if step <= 0:
        steps = np.diff(values)
        raise UserError(
            f"{files}: the times of the snapshots go from {values[0]:g} to {values[-1]:g} in uneven steps, from "
            f"{steps.min():g} to {steps.max():g}: the model needs a constant time step; choose a part with `snapshots`"
        )
    if given is not None and abs(step - given) > UNEVEN * step:
        raise UserError(
            f"{files}: time_step is {given:g}, but the times in the files go in steps of {step:g}: write "
            f"`time_step: {step / mapping.scale.time:g}`, and scale.time if your unit of time is another"
        )
    return float(values[0]), step


def gap_warning(found: Plan) -> str:
    """Return a warning of a snapshot that seems to be missing, if only names tell the time; "" if there is none."""
    places = found.velocity[0]
    names = [place.name for place in places]
    if found.times is not None or any(place.time is not None for place in places):
        return ""
    gap = largest_gap(names if len(set(names)) == len(names) else [str(place.path) for place in places])
    if gap is None:
        return ""
    return (
        f"warning: {gap[0]} is followed by {gap[1]}, which is a larger step than others: is a snapshot missing? "
        "the time step is taken as constant"
    )
