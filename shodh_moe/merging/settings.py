"""Parameters of a merge: those that each method accepts, and their values for one tensor."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shodh_moe.base.errors import UserError

Number = float | bool
DISTANCE_LIMIT = 1.0  # |theta - theta_0| / |theta_0|: about sqrt(2) for an unrelated network of the same size


class Conditional(BaseModel):
    """A value for tensors whose names contain ``filter`` or match ``regex``; without both, for all other tensors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    filter: str | None = None
    regex: str | None = None
    value: Number = Field(union_mode="left_to_right")

    @model_validator(mode="after")
    def _one(self) -> Conditional:
        if self.filter is not None and self.regex is not None:
            raise ValueError(f"filter {self.filter!r} and regex {self.regex!r} are in one entry: choose one of them")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex {self.regex!r} is not a regular expression ({error})") from None
        return self

    @property
    def written(self) -> str | None:
        """The condition as written in the config; None if it matches every tensor."""
        if self.regex is not None:
            return f"regex {self.regex!r}"
        return None if self.filter in (None, "*") else f"filter {self.filter!r}"

    def fits(self, name: str) -> bool:
        if self.regex is not None:
            return re.search(self.regex, name) is not None
        return self.filter in (None, "*") or self.filter in name


def _plain(value: Any) -> Any:
    """Validate a setting with one clear message, in place of pydantic's one per allowed type."""
    if isinstance(value, dict):
        return {axis: _single(one) for axis, one in value.items()}
    return _single(value)


def _single(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(one, (dict, Conditional)) for one in value):
        raise ValueError(
            "a list of numbers is mergekit's gradient over the layers of a language model, which this command does not "
            "support: use filters for single tensors, and `sweep` for several outputs"
        )
    if not isinstance(value, (int, float, list)):
        raise ValueError(
            "a parameter is a number, true, false, a list of `- filter: ... value: ...`, or one of these by axis, not "
            f"{value!r}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a parameter is a finite number, not {value}")
    return value


Single = bool | float | list[Conditional]
Setting = Annotated[Single | dict[str, Single], BeforeValidator(_plain)]
BY_AXIS = ("alpha", "coordinate", "gamma", "power", "clip", "straight")  # may be mappings from the names of axes


# Parameters of limited range, whatever the method; gamma is that of breadcrumbs, not ccm's.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "density": ("a share in (0, 1]", lambda value: 0 < value <= 1),
    "gamma": ("a share in [0, 1)", lambda value: 0 <= value < 1),
    "epsilon": ("a share in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "seed": ("a whole number from 0 to 2^53 - 1", lambda value: 0 <= value < 2**53 and value == int(value)),
    "max_iter": ("a whole number from 0 to 10000", lambda value: 0 <= value <= 10_000 and value == int(value)),
    "tol": ("between 0 and 1", lambda value: 0 < value < 1),
}


class Method(NamedTuple):
    """Requirements and parameters of a merge method.

    Attributes:
        recipe: function from a `TensorMerge` to the `Recipe` of that tensor (recipe.py).
        models: number of models to combine, without a dropped base; 0: any number.
        needs_base: ``base_model`` is required.
        drops_base: ``base_model`` may also be listed among the models, but is not combined as one of them.
        ordered: the order of models has a meaning.
        shared: parameters for all models, which may have filters.
        single: parameters for all models, which are a single number.
        own: parameters of a single model.
        least: smallest number of models, without a dropped base.
    """

    recipe: Callable[[Any], Any]
    models: int
    needs_base: bool
    drops_base: bool
    ordered: bool
    shared: tuple[str, ...]
    single: tuple[str, ...]
    own: tuple[str, ...]
    least: int = 1


@dataclass(frozen=True)
class Lookup:
    """Look up one target's parameters for a tensor; a model's own parameters override the shared ones."""

    shared: dict[str, Setting]
    own: list[dict[str, Setting]]

    def value(self, key: str, tensor: str, default: Number | None = None, model: int | None = None) -> float:
        """A parameter's value for a tensor. Raises: UserError: no value applies, and there is no default."""
        for settings in ([] if model is None else [self.own[model]]) + [self.shared]:
            if (found := _evaluate(settings.get(key), tensor)) is not None:
                return float(found)
        if default is None:
            raise UserError(f"parameter {key} has no value for tensor {tensor}: add `- value: ...` without a filter")
        return float(default)

    def conditions(self) -> list[Conditional]:
        """Return all filtered values of all parameters."""
        settings = [single for one in (self.shared, *self.own) for value in one.values() for single in singles(value)]
        return [condition for setting in settings if isinstance(setting, list) for condition in setting]


def singles(setting: Setting) -> list[Single]:
    """The values of a mapping by axis; a list with the setting itself if it is not a mapping."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def _evaluate(setting: Setting | None, tensor: str) -> Number | None:
    assert not isinstance(setting, dict)  # only ccm has values by axis, and alpha.py evaluates those
    if isinstance(setting, list):
        return next((condition.value for condition in setting if condition.fits(tensor)), None)
    return setting


def check_settings(
    name: str, method: Method, shared: dict[str, Setting], own: list[dict[str, Setting]], where: str
) -> None:
    """Check the parameters of the method ``name``.

    Raises:
        UserError: the method does not take a parameter, or a value is not valid.
    """
    for settings, valid in [(shared, (*method.shared, *method.single)), *((one, method.own) for one in own)]:
        for key, setting in settings.items():
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1)
                there = "for a model" if settings is not shared else "for all models"
                known = f"the nearest is {near[0]!r}" if near else f"it takes {', '.join(valid) or 'none'}"
                raise UserError(f"{where}: {name} takes no parameter {key!r} {there}; {known}")
            if isinstance(setting, dict) and not (key in BY_AXIS and "coordinate" in method.own):
                raise UserError(f"{where}: parameter {key} takes no values by axis: give one number")
            if key in (*method.single, "coordinate") and any(isinstance(one, list) for one in singles(setting)):
                raise UserError(f"{where}: parameter {key} is one number for all tensors: it takes no filters")
            if key not in RANGES or (key in BY_AXIS and "coordinate" in method.own):
                continue
            what, valid_value = RANGES[key]
            for value in [one.value for one in setting] if isinstance(setting, list) else singles(setting):
                if not valid_value(value):  # type: ignore[arg-type]
                    raise UserError(f"{where}: {key} is {what}, not {value:.17g}")
