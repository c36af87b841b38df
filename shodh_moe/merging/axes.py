"""Arrange ccm's experts along physical axes: find the layout of their points, and each model's coefficient.

There are four layouts: ``line``, two models at the ends of one axis; ``curve``, these and a third one between them;
``corners``, 2^n models at all corners of a box with n axes; and ``star``, 2 n models, each at an end of one axis and in
the middle of all others.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from shodh_moe.base.errors import UserError

Point = dict[str, float]
EXPECTED = (
    "give 2^n models at all corners of n axes, or 2 n, each at an end of one axis and in the middle of all others"
)


@dataclass(frozen=True)
class Layout:
    """A layout of models.

    Attributes:
        models: paths, in an order that does not depend on the config's, except for a line without coordinates.
        axes: sorted names; one empty name if the coordinates are plain numbers.
        ends: lowest and highest coordinate of each axis; empty without coordinates.
        places: each model's position on each axis: -1 at its low end, 1 at its high end, 0 in the middle.
        between: coordinate of the model between the ends of a curve.
        at: its alpha.
    """

    kind: Literal["line", "curve", "corners", "star"]
    models: tuple[str, ...]
    axes: tuple[str, ...]
    ends: dict[str, tuple[float, float]]
    places: tuple[tuple[int, ...], ...]
    between: float = 0.0
    at: float = 0.0

    def with_power(self, power: float) -> Layout:
        """The layout of a curve if alpha is linear in the coordinate to this power; see `alpha_at`."""
        return replace(self, at=alpha_at(self.between, *self.ends[self.axes[0]], power))

    def coefficients(self, alphas: list[float]) -> list[float]:
        """Coefficients of base and models for one alpha per axis (CCM, arXiv 2605.14546, extended to n axes).

        line and corners: theta = sum over models of prod_k (1 + s_k alpha_k)/2 theta_s, s the model's place; the base
        cancels. If every alpha is -1 or 1, one coefficient is 1 and all others are 0: that expert, bit for bit.

        star: theta = theta_0 + sum_k (shared_k + alpha_k direction_k) with shared_k = (d_low,k + d_high,k)/2,
        direction_k = (d_high,k - d_low,k)/2, d = theta - theta_0; so the base's coefficient is 1 - n.

        curve: the parabola through theta_low at alpha = -1, theta_between at ``at`` and theta_high at 1.
        """
        if self.kind == "curve":
            return [0.0, *parabola(alphas[0], self.at)]
        base = 1.0 - len(self.axes) if self.kind == "star" else 0.0
        factors = [[(1 + s * a) / 2 for s, a in zip(place, alphas, strict=True) if s] for place in self.places]
        return [base, *(math.prod(one) for one in factors)]

    def role(self, model: str) -> str:
        """A model's position in words: ``low``, or ``gravity=low, viscosity=high``."""
        ends = [(axis, s) for axis, s in zip(self.axes, self.places[self.models.index(model)], strict=True) if s]
        if self.kind == "curve" and not ends:
            return f"{self.axes[0]}=between" if self.axes[0] else "between"
        return ", ".join((f"{axis}=" if axis else "") + ("low" if s < 0 else "high") for axis, s in ends)


def alpha_at(coordinate: float, low: float, high: float, power: float = 1) -> float:
    """Return alpha = 2 (x - x_mid)/(x_high - x_low), where x is the coordinate to this ``power``, or its log for 0.

    The result is exactly -1 and 1 at the ends. For any power except 1, coordinates must be positive.
    """
    if power != 1:
        low, high, coordinate = (math.log(value) if power == 0 else value**power for value in (low, high, coordinate))
    return ((coordinate - low) + (coordinate - high)) / (high - low)


def parabola(alpha: float, at: float, bow: float = 1.0) -> list[float]:
    """Coefficients of the models at -1, ``at`` and 1 for the point at ``alpha`` of the parabola through them.

    They are exactly 0 and 1 at -1 and 1, and for ``at`` 0 also there.

    Args:
        bow: share of the parabola's distance from the straight line between the ends.
    """
    share = bow * (1 - alpha * alpha) / (1 - at * at)
    return [(1 - alpha) / 2 - share * (1 - at) / 2, share, (1 + alpha) / 2 - share * (1 + at) / 2]


def in_order(models: list[str], where: str) -> Layout:
    """Return the line of two models without coordinates, given in the order low, high.

    Raises:
        UserError: there are not exactly two models.
    """
    if len(models) != 2:
        raise UserError(
            f"{where}: ccm combines 2 models besides base_model, low and high, but models has {len(models)}; "
            "for several axes give each model its coordinate by axis"
        )
    return Layout("line", tuple(models), ("",), {}, ((-1,), (1,)))


def find_layout(points: dict[str, Point], where: str) -> Layout:
    """Find the layout of the models' points; ``points`` maps paths to coordinates by axis.

    Raises:
        UserError: models name different axes, share a point, or do not form a layout.
    """
    models = list(points)
    axes = tuple(sorted(points[models[0]]))
    for model in models:
        if (others := tuple(sorted(points[model]))) != axes:
            raise UserError(
                f"{where}: the coordinate of {model} has {_names(others)}, that of {models[0]} has {_names(axes)}: "
                "name the same axes for all models"
            )
    for one, other in itertools.combinations(models, 2):
        if points[one] == points[other]:
            raise UserError(
                f"{where}: {one} and {other} have the same coordinate {written(points[one])}: ccm needs two ends of a "
                "range, each from one model"
            )
    values = {axis: sorted({point[axis] for point in points.values()}) for axis in axes}
    for axis in axes:
        if len(values[axis]) == 1:
            raise UserError(
                f"{where}: all models have {axis or 'coordinate'}={values[axis][0]:g}: an axis needs models at "
                "two ends; give other values, or leave this axis out"
            )
    if len(axes) == 1 and len(models) > 3:
        raise UserError(
            f"{where}: {len(models)} models lie on one axis, at {_listed(axes[0], points)}: keep its two ends, and at "
            "most one between them; for several axes name them, as in `coordinate: {viscosity: 0.001, gravity: 9.8}`"
        )
    if len(axes) == 1 and len(models) == 3:
        low, between, high = values[axes[0]]
        ordered = sorted(models, key=lambda model: points[model][axes[0]])
        curve = Layout("curve", tuple(ordered), axes, {axes[0]: (low, high)}, ((-1,), (0,), (1,)), between)
        return curve.with_power(1)
    counts = {len(one) for one in values.values()}
    if counts == {2}:
        places = _corners(points, values, where)
        kind: Literal["line", "corners", "star"] = "line" if len(axes) == 1 else "corners"
    elif counts == {3}:
        places = _star(points, values, where)
        kind = "star"
    else:
        axis = max(axes, key=lambda one: len(values[one]))
        raise UserError(
            f"{where}: {axis} is {_listed(axis, points)}, so the models are neither corners of a box nor a star: "
            f"{EXPECTED}"
        )
    ordered = sorted(models, key=lambda model: places[model])
    ends = {axis: (values[axis][0], values[axis][-1]) for axis in axes}
    return Layout(kind, tuple(ordered), axes, ends, tuple(places[model] for model in ordered))


def _corners(points: dict[str, Point], values: dict[str, list[float]], where: str) -> dict[str, tuple[int, ...]]:
    places = {
        model: tuple(-1 if point[axis] == values[axis][0] else 1 for axis in values) for model, point in points.items()
    }
    there = set(places.values())
    for corner in itertools.product((-1, 1), repeat=len(values)):
        if corner not in there:
            missing = {axis: values[axis][max(0, s)] for axis, s in zip(values, corner, strict=True)}
            raise UserError(f"{where}: no model is at the corner {written(missing)}: add it; {EXPECTED}")
    return places


def _star(points: dict[str, Point], values: dict[str, list[float]], where: str) -> dict[str, tuple[int, ...]]:
    places = {model: tuple(values[axis].index(point[axis]) - 1 for axis in values) for model, point in points.items()}
    for model, place in places.items():
        ends = [axis for axis, s in zip(values, place, strict=True) if s]
        if len(ends) != 1:
            at = f"at an end of {' and of '.join(ends)}" if ends else "in the middle of all axes, as base_model is"
            raise UserError(f"{where}: {model} ({written(points[model])}) is {at}: leave it out; {EXPECTED}")
    return places


def written(point: Point) -> str:
    """A point as written in the config: ``gravity=9.8, viscosity=0.001``, or ``3``."""
    return ", ".join(f"{axis}={point[axis]:g}" if axis else f"{point[axis]:g}" for axis in sorted(point))


def _listed(axis: str, points: dict[str, Point]) -> str:
    """List the models with each value on an axis."""
    by_value: dict[float, list[str]] = {}
    for model, point in points.items():
        by_value.setdefault(point[axis], []).append(model)
    return "; ".join(f"{value:g} in {', '.join(by_value[value])}" for value in sorted(by_value))


def _names(axes: tuple[str, ...]) -> str:
    if not axes:
        return "no axis"
    return f"axes {', '.join(axes)}" if axes != ("",) else "a plain number"
