"""The words of a merge: mergekit's YAML, and what a sweep adds to it.

``merge_method``, ``models``, ``parameters``, ``base_model``, ``dtype`` and ``out_dtype`` mean what they mean in
mergekit; ``output``, ``format`` and ``sweep`` are ours. A sweep makes several targets of one file.
"""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shodh_moe.base.errors import UserError
from shodh_moe.config.load import read_yaml
from shodh_moe.merging.alpha import Composition, compose
from shodh_moe.merging.methods import METHODS
from shodh_moe.merging.settings import Setting, check_settings

DTYPES = Literal["float64", "float32", "float16", "bfloat16"]
NAME = re.compile(r"[A-Za-z0-9_.+=-]+")
_PLACE = ("alpha", "coordinate")  # either says where ccm's target lies
NOT_OURS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelWords(_Strict):
    """One entry of ``models``."""

    model: str = Field(min_length=1)
    parameters: dict[str, Setting] = {}


class Words(_Strict):
    """A merge of one output, as written."""

    merge_method: str
    models: list[ModelWords] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Setting] = {}
    dtype: DTYPES | None = None
    out_dtype: DTYPES | None = None
    format: Literal["safetensors", "pt", "checkpoint"] | None = None

    @model_validator(mode="after")
    def _known(self) -> Words:
        if self.merge_method not in METHODS:
            raise ValueError(f"unknown merge_method {self.merge_method!r}; the methods are {', '.join(METHODS)}")
        return self


@dataclass
class Target:
    """One output of a merge.

    Attributes:
        name: of the sweep's entry; empty without a sweep.
        output: the new folder.
        words: as written, the sweep's entry applied.
        base: path of the base model, if there is one.
        models: the paths that are combined, without the base. In the order of the words where it has a meaning (slerp,
            ccm without coordinates), else sorted, so that the order in the file does not change a bit.
        settings: of each of ``models``.
        composition: for ccm: the coefficients of base and models.
        alpha: for ccm: its value, and how it was found.
        warnings: to be shown to the user, and kept in the manifest.
    """

    name: str
    output: Path
    words: Words
    base: str | None
    models: list[str]
    settings: list[dict[str, Setting]]
    composition: Composition | None = None
    alpha: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return self.words.merge_method

    @property
    def paths(self) -> list[str]:
        """All inputs, the base first."""
        return [*([self.base] if self.base else []), *self.models]


def load_targets(path: Path, output: Path | None = None, found: dict[str, Any] | None = None) -> list[Target]:
    """The outputs that a config asks for; ``output`` replaces its word of that name.

    Args:
        found: an alpha that was chosen outside, and how, in place of the parameters ``alpha`` and ``coordinate``: its
            ``value``, the word ``found``, and what else the manifest shall say of it.

    Raises:
        UserError: unreadable, unknown or wrong words; no output; models that do not fit the method; ``found`` for a
            sweep, for another method than ccm, or for several axes.
    """
    tree = read_yaml(path, "check its path")
    sweep = tree.pop("sweep", None)
    named = tree.pop("output", None)
    folder = output or (Path(named) if isinstance(named, str) and named else None)
    if folder is None:
        raise UserError(f"{path}: there is no output folder: write `output: FOLDER`, or give --output")
    if found and sweep is not None:
        raise UserError(f"{path}: the readout {found['found']} chooses one alpha: leave out sweep")
    if sweep is None:
        return [_target("", folder, _words(path, tree), found)]
    targets = []
    for name, entry in _entries(path, sweep):
        merged = {**tree, **entry}
        own = entry.get("parameters", {})
        if isinstance(own, dict) and isinstance(tree.get("parameters"), dict):
            # alpha and coordinate exclude each other: the entry's own one counts.
            shared = tree["parameters"]
            merged["parameters"] = {**(_without_place(shared) if {*_PLACE} & {*own} else shared), **own}
        targets.append(_target(name, folder / name, _words(path, merged, f"sweep {name}: ")))
    names = [target.name for target in targets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: the sweep has two outputs of the name {twice}: name each differently")
    return targets


def _without_place(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in _PLACE}


def _entries(path: Path, sweep: Any) -> list[tuple[str, dict[str, Any]]]:
    """A mapping of parameters to lists of values is their grid; a list holds named changes of any words."""
    if isinstance(sweep, dict) and sweep and all(isinstance(values, list) and values for values in sweep.values()):
        if key := next((key for key, values in sweep.items() if any(isinstance(one, dict) for one in values)), None):
            raise UserError(
                f"{path}: sweep has {key} by axis: write a list of entries instead, each with a name and its parameters"
            )
        entries = []
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            entries.append((",".join(f"{key}={value}" for key, value in chosen.items()), {"parameters": chosen}))
        # A comma is no part of a name.
        return [(_name(path, name.replace(",", "_")), entry) for name, entry in entries]
    if isinstance(sweep, list) and sweep and all(isinstance(entry, dict) for entry in sweep):
        return [(_name(path, entry.get("name")), {k: v for k, v in entry.items() if k != "name"}) for entry in sweep]
    raise UserError(
        f"{path}: sweep should be `parameter: [values]`, or a list of entries with a name and the words they change"
    )


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"{path}: an entry of the sweep needs a name of letters, digits and _ . + = -, not {name!r}")
    return name


def _words(path: Path, tree: dict[str, Any], where: str = "") -> Words:
    try:
        return Words.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {where}{_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first mistake: key and remedy."""
    # A setting may be of several types, and has a mistake for each: that of the longest path is the user's.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    # pydantic's parts of a place are not the user's.
    types = ("list[", "dict[", "[key]", "function", "Conditional", "bool", "float")
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(types))
    last = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        if last in NOT_OURS:
            return f"{key} is mergekit's word for language models, which this command does not know: leave it out"
        valid = [*Words.model_fields, "output", "sweep"] if len(first["loc"]) == 1 else ["model", "parameters"]
        valid = ["filter", "regex", "value"] if "list[" in str(first["loc"]) else valid
        near = difflib.get_close_matches(last, valid, n=1)
        return f"unknown key {key!r}; " + (f"the nearest valid one is {near[0]!r}" if near else f"valid: {valid}")
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    return f"{key}: {first['msg']}, not {str(first['input'])[:60]!r}"


def _target(name: str, output: Path, words: Words, found: dict[str, Any] | None = None) -> Target:
    if found:
        if words.merge_method != "ccm":
            raise UserError(f"{output}: the readout {found['found']} is for ccm, not for {words.merge_method}")
        words = words.model_copy(update={"parameters": _without_place(words.parameters)})
    method = METHODS[words.merge_method]
    entries = [entry for entry in words.models if not (method.drops_base and entry.model == words.base_model)]
    paths = [entry.model for entry in entries]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{output}: models names {twice} twice: name each model once")
    if method.needs_base and not words.base_model:
        raise UserError(f"{output}: {words.merge_method} needs base_model, the model that the others were trained from")
    if method.models and len(entries) != method.models:
        base = " beside base_model" if method.drops_base else ""
        raise UserError(
            f"{output}: {words.merge_method} combines {method.models} model(s){base}, and models has {len(entries)}"
        )
    if not entries:
        raise UserError(f"{output}: models has nothing beside base_model: name what to merge")
    if not method.ordered:
        entries.sort(key=lambda entry: entry.model)
    settings = [entry.parameters for entry in entries]
    check_settings(words.merge_method, method, words.parameters, settings, str(output))
    target = Target(name, output, words, words.base_model, [entry.model for entry in entries], settings)
    if words.merge_method == "ccm":
        own = dict(zip(target.models, settings, strict=True))
        composed = compose(words.parameters, own, words.base_model is not None, str(output), found)
        target.composition, target.alpha, target.warnings = composed
        target.models = list(target.composition.layout.models)
        target.settings = [own[model] for model in target.models]
    return target
