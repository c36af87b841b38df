"""Parameters of a merge: which each method takes, and their value for one tensor."""

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
DISTANCE_LIMIT = 1.0  # |theta - theta_0| / |theta_0|: an unrelated network of the same size is at about sqrt(2)


class Conditional(BaseModel):
    """A value for the tensors whose names hold ``filter``, or match ``regex`` anywhere; for all others without both."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    filter: str | None = None
    regex: str | None = None
    value: Number = Field(union_mode="left_to_right")

    @model_validator(mode="after")
    def _one(self) -> Conditional:
        if self.filter is not None and self.regex is not None:
            raise ValueError(f"filter {self.filter!r} and regex {self.regex!r} stand in one entry: choose one of them")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex {self.regex!r} is no regular expression ({error})") from None
        return self

    @property
    def written(self) -> str | None:
        """The condition as a user would recognise it."""
        if self.regex is not None:
            return f"regex {self.regex!r}"
        return None if self.filter in (None, "*") else f"filter {self.filter!r}"

    def fits(self, name: str) -> bool:
        if self.regex is not None:
            return re.search(self.regex, name) is not None
        return self.filter in (None, "*") or self.filter in name


def _plain(value: Any) -> Any:
    """One clear message in place of one for each type that a setting may have."""
    if isinstance(value, dict):
        return {axis: _single(one) for axis, one in value.items()}
    return _single(value)


def _single(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(one, (dict, Conditional)) for one in value):
        raise ValueError(
            "a list of numbers is mergekit's gradient over the layers of a language model, which this command does not "
            "know: use filters for single tensors, and `sweep` for several outputs"
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
BY_AXIS = ("alpha", "coordinate", "gamma", "power", "clip", "straight")  # may be a mapping by the names of axes


class Method(NamedTuple):
    """What a method takes.

    Attributes:
        recipe: a function from a `TensorMerge` to the `Recipe` of that tensor (methods.py).
        models: how many models it combines, the base not counted where it is dropped; 0: any number.
        needs_base: it cannot do without ``base_model``.
        drops_base: the base may stand among the models too, and is not combined as one of them.
        ordered: the order of models has a meaning.
        shared: parameters for all models, with filters.
        single: parameters for all models that are one number.
        own: parameters that a model may have for itself.
    """

    recipe: Callable[[Any], Any]
    models: int
    needs_base: bool
    drops_base: bool
    ordered: bool
    shared: tuple[str, ...]
    single: tuple[str, ...]
    own: tuple[str, ...]


@dataclass(frozen=True)
class Lookup:
    """Parameters of one target by tensor: a model's own come before those for all."""

    shared: dict[str, Setting]
    own: list[dict[str, Setting]]

    def value(self, key: str, tensor: str, default: Number | None = None, model: int | None = None) -> float:
        """Raises: UserError: nothing says what it is for this tensor, and there is no default."""
        for settings in ([] if model is None else [self.own[model]]) + [self.shared]:
            if (found := _evaluate(settings.get(key), tensor)) is not None:
                return float(found)
        if default is None:
            raise UserError(f"parameter {key} has no value for tensor {tensor}: add `- value: ...` without a filter")
        return float(default)

    def conditions(self) -> list[Conditional]:
        settings = [single for one in (self.shared, *self.own) for value in one.values() for single in singles(value)]
        return [condition for setting in settings if isinstance(setting, list) for condition in setting]


def singles(setting: Setting) -> list[Single]:
    """The values of a mapping by axis; a setting that is no mapping stands alone."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def _evaluate(setting: Setting | None, tensor: str) -> Number | None:
    assert not isinstance(setting, dict)  # those are for ccm alone, which takes them apart (alpha.py)
    if isinstance(setting, list):
        return next((condition.value for condition in setting if condition.fits(tensor)), None)
    return setting


def check_settings(
    name: str, method: Method, shared: dict[str, Setting], own: list[dict[str, Setting]], where: str
) -> None:
    """Raises: UserError: a parameter that the method ``name`` does not take, or a value it cannot have."""
    for settings, valid in [(shared, (*method.shared, *method.single)), *((one, method.own) for one in own)]:
        for key, setting in settings.items():
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1)
                there = "for a model" if settings is not shared else "for all models"
                known = f"the nearest is {near[0]!r}" if near else f"it takes {', '.join(valid) or 'none'}"
                raise UserError(f"{where}: {name} takes no parameter {key!r} {there}; {known}")
            if isinstance(setting, dict) and key not in BY_AXIS:
                raise UserError(f"{where}: parameter {key} takes no values by axis: give one number")
            if key in (*method.single, "coordinate") and any(isinstance(one, list) for one in singles(setting)):
                raise UserError(f"{where}: parameter {key} is one number for all tensors: it takes no filters")
            if key == "density":
                values = [one.value for one in setting] if isinstance(setting, list) else singles(setting)
                if any(not 0 < value <= 1 for value in values):  # type: ignore[operator]
                    raise UserError(f"{where}: density is a share in (0, 1], not {values}")
