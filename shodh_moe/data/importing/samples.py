"""Files that hold many trajectories: along an axis n of each array, or in datasets named after the trajectory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.file_set import open_array_files
from shodh_moe.data.importing.mapping import SAMPLE, Mapping
from shodh_moe.data.importing.order import number_key
from shodh_moe.formats import Array, Part

View = Callable[[Array], Array]


def sample_names(mapping: Mapping, entries: list[list[Path]]) -> list[str]:
    """List the trajectories in the files of one entry: their numbers along n, or the names that ``{n}`` stands for.

    Raises:
        UserError: a file cannot be read, or has no dataset that the mapping names.
    """
    velocity = mapping.velocity if isinstance(mapping.velocity, str) else mapping.velocity[0]
    with open_array_files(entries) as files:
        first = files.paths[0]
        if "n" in mapping.axes:
            path, name = files.find(velocity)[0]
            array = files.at(path).array(name)
            count = array.shape[_position(mapping, array)]
            if not count:
                raise UserError(f"{path}: {name} has shape {array.shape}, which holds no trajectory")
            return [str(number) for number in range(count)]
        before, after = (_regex(part) for part in velocity.split(SAMPLE))
        pattern = re.compile(f"{before}([^/]+){after}")
        names = files.at(first).names
        for name, what in files.at(first).unusable.items():
            if pattern.fullmatch(name) or re.fullmatch(f"{before}[^/]+", name):
                raise UserError(f"{first}: {name} is {what}")
        found = {match.group(1) for name in names if (match := pattern.fullmatch(name))}
    if not found:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise UserError(f"{first} has no dataset {velocity!r}; it has {shown or 'none'}")
    return sorted(found, key=number_key)


def _regex(pattern: str) -> str:
    return ".*".join(re.escape(part) for part in pattern.split("*"))


def mapping_of(mapping: Mapping, sample: str) -> Mapping:
    """The mapping of one trajectory: without the axis n, and with its name instead of ``{n}``."""

    def named(text: str) -> str:
        return text.replace(SAMPLE, sample)

    changes: dict[str, object] = {"axes": [axis for axis in mapping.axes if axis != "n"]}
    changes["velocity"] = (
        named(mapping.velocity) if isinstance(mapping.velocity, str) else [named(name) for name in mapping.velocity]
    )
    for key in ("pressure", "time"):
        if getattr(mapping, key) is not None:
            changes[key] = named(getattr(mapping, key))
    if mapping.mask:
        changes["mask"] = mapping.mask.model_copy(update={"dataset": named(mapping.mask.dataset)})
    if mapping.coordinates:
        names = {axis: named(name) for axis, name in mapping.coordinates}
        changes["coordinates"] = mapping.coordinates.model_copy(update=names)
    return mapping.model_copy(update=changes)


def view_of(mapping: Mapping, sample: str, count: int) -> View | None:
    """A function that cuts one of ``count`` trajectories out of an array; None if arrays have no axis n.

    Coordinates, times and masks may be shared by all trajectories, so the number of axes decides: times may have n and
    t, masks n, x, y and z.
    """
    if "n" not in mapping.axes:
        return None
    number = int(sample)

    def view(array: Array) -> Array:
        if len(array.shape) in (0, 1, 3):
            return array
        at = _position(mapping, array)
        if array.shape[at] != count:
            raise UserError(
                f"{array.path}: {array.name} has shape {array.shape}, but the velocity has {count} trajectories: "
                "every field needs the axis n"
            )

        def raw(part: Part) -> object:
            return array.raw((*part[:at], number, *part[at:]))

        shape = (*array.shape[:at], *array.shape[at + 1 :])
        dimensions = (*array.dimensions[:at], *array.dimensions[at + 1 :])
        return replace(array, name=f"{array.name}[n={number}]", shape=shape, raw=raw, dimensions=dimensions)

    return view


def _position(mapping: Mapping, array: Array) -> int:
    """The position of the axis n in an array: a field, a mask (without t and c), or times (n and t)."""
    axes: list[str] = list(mapping.axes)
    kinds = [axes, [axis for axis in axes if axis != "c"]]
    kinds += [[axis for axis in axes if axis not in "tc"], [axis for axis in axes if axis in "nt"]]
    for kind in kinds:
        if len(kind) == len(array.shape):
            return kind.index("n")
    raise UserError(f"{array.path}: {array.name} has shape {array.shape}, expected the axes [{', '.join(axes)}]")
