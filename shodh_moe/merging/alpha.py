"""Find alpha on each axis of a ccm target: given, from a coordinate, or from an external readout (DESIGN 3.7)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.merging.axes import Layout, Point, alpha_at, find_layout, in_order
from shodh_moe.merging.settings import Conditional, Lookup, Setting, Single

REACH = 1.5  # largest |alpha| in the bank of the CCM paper


@dataclass(frozen=True)
class Composition:
    """The experts' layout, and the target's alpha on each axis (a number, or filters)."""

    layout: Layout
    alphas: Mapping[str, Setting]

    def coefficients(self, tensor: str) -> list[float]:
        """Return the coefficients of the base and of ``layout.models`` for one tensor.

        Raises:
            UserError: no filter gives alpha for this tensor.
        """
        alphas = [Lookup({"alpha": self.alphas[axis]}, []).value("alpha", tensor) for axis in self.layout.axes]
        return self.layout.coefficients(alphas)


def compose(
    shared: dict[str, Setting],
    own: dict[str, dict[str, Setting]],
    base: bool,
    where: str,
    found: dict[str, Any] | None = None,
) -> tuple[Composition, dict[str, Any], list[str]]:
    """Compose a ccm target, and return it with the manifest's record of alpha and with warnings for the user.

    Args:
        shared: parameters for all models: ``alpha``, or ``coordinate`` with ``gamma``, ``power`` and ``clip``.
        own: parameters of each model, by its path.
        base: whether there is a base model.
        found: record of an alpha from an external readout, with its ``value`` (a number, or filters as in a config);
            the manifest stores it unchanged.

    Raises:
        UserError: neither or both of alpha and coordinate are given, the models do not form a layout, or an axis is
            missing, unknown or has an invalid value.
    """
    layout = _layout(own, where)
    if layout.kind == "star" and not base:
        raise UserError(f"{where}: the models form a star, which needs base_model as its centre: add it")
    if layout.kind == "curve":
        layout = _placed(shared, layout, where)
    clip = _numbers(shared, "clip", layout, REACH, where)
    straight = _numbers(shared, "straight", layout, math.inf, where)
    for key, limits in (("clip", clip), ("straight", straight)):
        if negative := [limit for limit in limits.values() if limit < 0]:
            raise UserError(f"{where}: {key} is a largest |alpha| and cannot be {negative[0]:g}")
    alphas: Mapping[str, Single]
    value: Any = found["value"] if found else None
    warnings: list[str] = []
    if found:
        if len(layout.axes) > 1:
            raise UserError(f"{where}: the readout {found['found']} finds one alpha, but there are {_all(layout)}")
        if isinstance(value, list):  # one alpha for each group of tensors
            alphas = {layout.axes[0]: [Conditional.model_validate(one) for one in value]}
        else:
            alphas = {layout.axes[0]: float(value)}
        record = found
    elif ("alpha" in shared) == ("coordinate" in shared):
        raise UserError(f"{where}: ccm needs exactly one of alpha and coordinate under parameters")
    elif "alpha" in shared:
        alphas = _by_axis(shared, "alpha", layout, where)
        values = {axis: None if isinstance(alpha, list) else alpha for axis, alpha in alphas.items()}
        record = _record(layout, "given", {"value": values})
    else:
        alphas, record, warnings = _from_coordinate(shared, layout, clip, where)
    if found or "alpha" in shared:
        # A given alpha is not clipped, and a measured straight range takes precedence over clip.
        warnings = [
            f"{_of(axis)}alpha {value:g} is outside +-{clip[axis]:g}, where the path between the experts may not be "
            "straight"
            for axis, value in _values(alphas)
            if straight[axis] == math.inf and abs(value) > clip[axis]
        ]
    warnings += [
        f"{_of(axis)}alpha {value:g} is beyond +-{straight[axis]:g}, the range in which the path was measured to be "
        "straight: expect lower accuracy"
        for axis, value in _values(alphas)
        if abs(value) > straight[axis]
    ]
    return Composition(layout, dict(alphas)), record, warnings


def _from_coordinate(
    shared: dict[str, Setting], layout: Layout, clip: dict[str, float], where: str
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    if not layout.ends:
        raise UserError(
            f"{where}: a target coordinate needs the models' coordinates: add `coordinate` to each model's parameters"
        )
    wanted = {axis: _number(value) for axis, value in _by_axis(shared, "coordinate", layout, where).items()}
    gamma = _numbers(shared, "gamma", layout, 1.0, where)
    power = _numbers(shared, "power", layout, 1.0, where)
    unclipped, alphas, warnings = {}, {}, []
    for k, axis in enumerate(layout.axes):
        low, high = layout.ends[axis]
        if power[axis] != 1 and min(low, wanted[axis]) <= 0:
            first = next(model for model, place in zip(layout.models, layout.places, strict=True) if place[k] == -1)
            whose, value = (first, low) if low <= 0 else ("the target", wanted[axis])
            raise UserError(
                f"{where}: {axis or 'coordinate'} of {whose} is {value:g}: with `power: {power[axis]:g}` it must be "
                "positive"
            )
        _require_power(power[axis], where)
        unclipped[axis] = gamma[axis] * alpha_at(wanted[axis], low, high, power[axis])
        alphas[axis] = min(max(unclipped[axis], -clip[axis]), clip[axis])
        if alphas[axis] != unclipped[axis]:
            warnings.append(
                f"{axis or 'coordinate'} {wanted[axis]:g} is far outside {low:g} to {high:g}: alpha "
                f"{unclipped[axis]:g} is clipped to {alphas[axis]:g}"
            )
    ends = {end: {axis: layout.ends[axis][i] for axis in layout.axes} for i, end in enumerate(("low", "high"))}
    facts: dict[str, dict[str, Any]] = {
        "value": alphas,
        "unclipped": unclipped,
        "coordinate": wanted,
        **ends,
        "clip": clip,
    }
    if "gamma" in shared:
        facts["gamma"] = gamma
    if "power" in shared:
        facts["power"] = power
    return alphas, _record(layout, "scale" if "gamma" in shared else "coordinate", facts), warnings


def _placed(shared: dict[str, Setting], layout: Layout, where: str) -> Layout:
    """The layout of a curve for the parameter ``power``. Raises `UserError` if a coordinate does not permit it."""
    power = _numbers(shared, "power", layout, 1.0, where)[layout.axes[0]]
    _require_power(power, where)
    if power != 1 and (low := layout.ends[layout.axes[0]][0]) <= 0:
        raise UserError(
            f"{where}: {layout.axes[0] or 'coordinate'} of {layout.models[0]} is {low:g}: with `power: {power:g}` it "
            "must be positive"
        )
    return layout.with_power(power)


def _require_power(power: float, where: str) -> None:
    if abs(power) > 8:  # larger powers of common coordinates overflow float64
        raise UserError(f"{where}: power {power:g} is outside the range -8 to 8")


def _layout(own: dict[str, dict[str, Setting]], where: str) -> Layout:
    """Find the layout of the models. Raises: UserError: only some have a coordinate, or they do not form a layout."""
    without = [model for model in own if "coordinate" not in own[model]]
    if len(without) == len(own):
        return in_order(without, where)
    if without:
        other = next(model for model in own if model not in without)
        raise UserError(
            f"{where}: {other} has a coordinate and {without[0]} has none: give all models of ccm a coordinate, or none"
        )
    points: dict[str, Point] = {}
    for model, settings in own.items():
        coordinate = settings["coordinate"]
        if coordinate == {}:
            raise UserError(f"{where}: the coordinate of {model} names no axis: write `coordinate: {{AXIS: VALUE}}`")
        axes = coordinate if isinstance(coordinate, dict) else {"": coordinate}
        points[model] = {axis: _number(value) for axis, value in axes.items()}
    return find_layout(points, where)


def _by_axis(
    shared: dict[str, Setting], key: str, layout: Layout, where: str, default: Single | None = None
) -> dict[str, Single]:
    """Return a parameter's value on each axis.

    Args:
        default: value of axes that are missing from a mapping; None requires every axis, and a mapping if there are
            several.

    Raises:
        UserError: the mapping has an unknown axis or lacks one, or one number is given but each axis needs its own.
    """
    setting = shared[key] if default is None else shared.get(key, default)
    if not isinstance(setting, dict):
        if default is None and len(layout.axes) > 1:
            raise UserError(f"{where}: {key} is one value, but there are {_all(layout)}: give one value per axis")
        return dict.fromkeys(layout.axes, setting)
    for axis in setting:
        if layout.axes == ("",):
            raise UserError(
                f"{where}: {key} names the axis {axis!r}, but the models do not: give each model its coordinate by axis"
            )
        if axis not in layout.axes:
            near = difflib.get_close_matches(axis, layout.axes, n=1)
            known = f"the nearest is {near[0]!r}" if near else f"there are {_all(layout)}"
            raise UserError(f"{where}: {key} names the axis {axis!r}, which the models do not have; {known}")
    if default is None and (missing := [axis for axis in layout.axes if axis not in setting]):
        raise UserError(f"{where}: {key} of the target has no value for the axis {missing[0]!r}: add it")
    return {axis: setting[axis] if default is None else setting.get(axis, default) for axis in layout.axes}


def _numbers(shared: dict[str, Setting], key: str, layout: Layout, default: float, where: str) -> dict[str, float]:
    return {axis: _number(value) for axis, value in _by_axis(shared, key, layout, where, default).items()}


def _number(value: Single) -> float:
    assert not isinstance(value, list)  # check_settings lets no filters through
    return float(value)


def _values(alphas: Mapping[str, Single]) -> list[tuple[str, float]]:
    """All (axis, alpha) pairs, including the values of filters."""
    return [
        (axis, float(one))
        for axis, alpha in alphas.items()
        for one in ([condition.value for condition in alpha] if isinstance(alpha, list) else [alpha])
    ]


def _record(layout: Layout, found: str, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest's record: each fact by axis, or a single value if the axis has no name."""
    if layout.axes == ("",):
        return {"found": found, **{key: values[""] for key, values in facts.items()}}
    return {"found": found, "layout": layout.kind, **facts}


def _of(axis: str) -> str:
    return f"{axis}: " if axis else ""


def _all(layout: Layout) -> str:
    return f"{len(layout.axes)} axes ({', '.join(layout.axes)})"
