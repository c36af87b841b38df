"""The config of a merge: mergekit's YAML format, extended by sweeps.

``merge_method``, ``models``, ``parameters``, ``base_model``, ``dtype`` and ``out_dtype`` have the same meaning as in
mergekit; ``output``, ``format`` and ``sweep`` are extensions. A sweep defines several targets in one file.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shodh_moe.base.errors import UserError
from shodh_moe.base.paths import expand
from shodh_moe.base.section import PathText
from shodh_moe.config.load import read_yaml
from shodh_moe.merging.alpha import Composition, compose
from shodh_moe.merging.methods import METHODS
from shodh_moe.merging.settings import Setting, check_settings

DTYPES = Literal["float64", "float32", "float16", "bfloat16"]
NAME = re.compile(r"[A-Za-z0-9_.+=-]+")
_PLACE = ("alpha", "coordinate")  # either one gives the position of ccm's target
NOT_OURS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


class Strict(BaseModel):
    """A part of a config: unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelEntry(Strict):
    """One entry of ``models``."""

    model: PathText = Field(min_length=1)
    parameters: dict[str, Setting] = {}


class MergeConfig(Strict):
    """The config of one output, as written."""

    merge_method: str
    models: list[ModelEntry] = Field(min_length=1)
    base_model: PathText | None = None
    parameters: dict[str, Setting] = {}
    dtype: DTYPES | None = None
    out_dtype: DTYPES | None = None
    format: Literal["safetensors", "pt", "checkpoint"] | None = None

    @model_validator(mode="after")
    def _known(self) -> MergeConfig:
        if self.merge_method not in METHODS:
            raise ValueError(f"unknown merge_method {self.merge_method!r}; the methods are {', '.join(METHODS)}")
        return self


@dataclass
class Target:
    """One output of a merge, with its settings checked.

    Attributes:
        name: name of the sweep's entry; empty without a sweep.
        output: the new folder.
        config: the merge as written, the sweep's entry applied.
        base: path of the base model, if there is one.
        models: paths of the models to combine, without the base. In the config's order if it has a meaning (slerp,
            ccm without coordinates), else sorted, so that the order in the config does not change the result.
        settings: parameters of each of ``models``.
        composition: for ccm: the coefficients of base and models.
        alpha: for ccm: the value of alpha and how it was found, as the manifest stores it.
        warnings: shown to the user and stored in the manifest.
    """

    name: str
    output: Path
    config: MergeConfig
    base: str | None
    models: list[str]
    settings: list[dict[str, Setting]]
    composition: Composition | None = None
    alpha: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return self.config.merge_method

    @property
    def paths(self) -> list[str]:
        """All inputs, the base first."""
        return [*([self.base] if self.base else []), *self.models]


def load_targets(
    config: Path | str | Mapping[str, Any],
    output: Path | None = None,
    found: dict[str, Any] | None = None,
    alphas: list[float] | None = None,
) -> list[Target]:
    """Read the targets of a config; ``output`` overrides the config's key of that name.

    Args:
        config: a YAML file, or its content.
        found: an alpha from an external readout that replaces the parameters ``alpha`` and ``coordinate``: its
            ``value``, the name of the readout as ``found``, and any other facts for the manifest.
        alphas: makes the config a sweep over these alphas, which replace ``alpha`` and ``coordinate``.

    Raises:
        UserError: the config is unreadable, or has unknown or invalid keys, no output, or models that do not fit the
            method; or ``found`` is given for a sweep, another method than ccm, or several axes; or ``alphas`` for a
            config with a sweep.
    """
    path = Path("the merge's config") if isinstance(config, Mapping) else Path(config)
    tree = dict(config) if isinstance(config, Mapping) else read_yaml(path, "check its path")
    sweep = tree.pop("sweep", None)
    named = tree.pop("output", None)
    try:
        folder = output or (Path(expand(named)) if isinstance(named, str) and named else None)
    except ValueError as error:
        raise UserError(f"{path}: output: {error}") from None
    if folder is None:
        raise UserError(f"{path} has no output folder: write `output: FOLDER`, or give --output")
    if found and sweep is not None:
        raise UserError(f"{path}: the readout {found['found']} chooses one alpha: leave out sweep")
    if alphas:
        if sweep is not None:
            raise UserError(f"{path} has a sweep of its own: remove it, or leave out --alpha")
        sweep = {"alpha": alphas}
    if sweep is None:
        return [_target("", folder, _merge_config(path, tree), found)]
    targets = []
    for name, entry in _entries(path, sweep):
        merged = {**tree, **entry}
        own = entry.get("parameters", {})
        if isinstance(own, dict) and isinstance(tree.get("parameters"), dict):
            # alpha and coordinate exclude each other: the entry's own key replaces either.
            shared = tree["parameters"]
            merged["parameters"] = {**(_without_place(shared) if {*_PLACE} & {*own} else shared), **own}
        targets.append(_target(name, folder / name, _merge_config(path, merged, f"sweep {name}: ")))
    names = [target.name for target in targets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: the sweep has two outputs named {twice}: give each its own name")
    return targets


def _without_place(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in _PLACE}


def _entries(path: Path, sweep: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, changed keys) of each entry: a mapping from parameters to lists of values is a grid of entries."""
    if isinstance(sweep, dict) and sweep and all(isinstance(values, list) and values for values in sweep.values()):
        if key := next((key for key, values in sweep.items() if any(isinstance(one, dict) for one in values)), None):
            raise UserError(
                f"{path}: sweep has {key} by axis: write a list of entries instead, each with a name and its parameters"
            )
        entries = []
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            entries.append((",".join(f"{key}={value}" for key, value in chosen.items()), {"parameters": chosen}))
        # A name cannot contain a comma.
        return [(_name(path, name.replace(",", "_")), entry) for name, entry in entries]
    if isinstance(sweep, list) and sweep and all(isinstance(entry, dict) for entry in sweep):
        return [(_name(path, entry.get("name")), {k: v for k, v in entry.items() if k != "name"}) for entry in sweep]
    raise UserError(
        f"{path}: sweep should be `parameter: [values]`, or a list of entries with a name and the keys they change"
    )


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"{path}: the name of a sweep's entry consists of letters, digits and _ . + = -, not {name!r}")
    return name


def _merge_config(path: Path, tree: dict[str, Any], where: str = "") -> MergeConfig:
    try:
        return MergeConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {where}{explain(error, MergeConfig, ModelEntry)}") from None


def explain(error: ValidationError, config: type[Strict], entry: type[Strict]) -> str:
    """Describe the first error: the key and a remedy; ``entry`` is the class of an entry of ``models``."""
    # pydantic reports an error for each type that a setting may have; the most specific one has the longest path.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    # Remove the parts of the location that pydantic added.
    types = ("list[", "dict[", "[key]", "function", "Conditional", "bool", "float")
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(types))
    last = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        if last in NOT_OURS:
            return f"{key} is a mergekit key for language models, which this command does not support: remove it"
        valid = [*config.model_fields, "output", "sweep"] if len(first["loc"]) == 1 else [*entry.model_fields]
        valid = ["filter", "regex", "value"] if "list[" in str(first["loc"]) else valid
        near = difflib.get_close_matches(last, valid, n=1)
        return f"unknown key {key!r}; " + (f"the nearest valid one is {near[0]!r}" if near else f"valid: {valid}")
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    return f"{key}: {first['msg']}, not {str(first['input'])[:60]!r}"


def _target(name: str, output: Path, config: MergeConfig, found: dict[str, Any] | None = None) -> Target:
    if found:
        if config.merge_method != "ccm":
            raise UserError(f"{output}: the readout {found['found']} is for ccm, not for {config.merge_method}")
        config = config.model_copy(update={"parameters": _without_place(config.parameters)})
    method = METHODS[config.merge_method]
    entries = [entry for entry in config.models if not (method.drops_base and entry.model == config.base_model)]
    paths = [entry.model for entry in entries]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{output}: models names {twice} twice: name each model once")
    if method.needs_base and not config.base_model:
        raise UserError(f"{output}: {config.merge_method} needs base_model, which the other models were trained from")
    if method.models and len(entries) != method.models:
        base = " besides base_model" if method.drops_base else ""
        raise UserError(
            f"{output}: {config.merge_method} combines {method.models} model(s){base}, but models has {len(entries)}"
        )
    if not entries:
        raise UserError(f"{output}: models has nothing besides base_model: add the models to merge")
    if len(entries) < method.least:
        raise UserError(
            f"{output}: {config.merge_method} combines at least {method.least} models besides base_model, but models "
            f"has {len(entries)}"
        )
    if not method.ordered:
        entries.sort(key=lambda entry: entry.model)
    settings = [entry.parameters for entry in entries]
    check_settings(config.merge_method, method, config.parameters, settings, str(output))
    target = Target(name, output, config, config.base_model, [entry.model for entry in entries], settings)
    if config.merge_method == "ccm":
        own = dict(zip(target.models, settings, strict=True))
        composed = compose(config.parameters, own, config.base_model is not None, str(output), found)
        target.composition, target.alpha, target.warnings = composed
        target.models = list(target.composition.layout.models)
        target.settings = [own[model] for model in target.models]
    return target
