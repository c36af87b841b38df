"""Reading a config file and overrides into a `Config`, and telling two configs apart."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shodh_moe.config import Config
from shodh_moe.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML alone reads ``1e-3`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: Path | str, overrides: list[str] | None = None, name: str | None = None) -> Config:
    """Read a YAML config and apply ``key.sub=value`` overrides, then the run's name.

    Raises:
        UserError: the file is missing or no YAML mapping, an override has no ``=``, a key is unknown
            (the nearest valid one is named), or a value has the wrong type or range.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")

    written_in: dict[str, str] = {}
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} must look like key.sub=value")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: {text!r} is no valid YAML value") from None
        _set(tree, key, value)
        written_in[key] = f"override {override!r}"
    if name is not None:
        _set(tree, "name", name)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, path, written_in)) from None


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _explain(error: ValidationError, path: Path, written_in: dict[str, str]) -> str:
    """The first mistake as one line: key, place, remedy."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    source = next((text for written, text in written_in.items() if (key + ".").startswith(written + ".")), str(path))
    if first["type"] == "extra_forbidden":
        valid = _keys(Config)
        near = _nearest(key, valid)
        return f"{source}: unknown key {key!r}" + (f"; the nearest valid key is {near!r}" if near else "")
    message = first["msg"].removeprefix("Value error, ")
    return f"{source}: {key or 'config'}: {message}" + (
        "" if first["type"] == "value_error" else f", not {first['input']!r}"
    )


def _nearest(key: str, valid: list[str]) -> str | None:
    """Prefer a sibling of nearly the same name; otherwise any key that reads alike."""
    parent = key.rpartition(".")[0]
    siblings = [k for k in valid if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    near = near or [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return near[0] if near else None


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a config model."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        types = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in types:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(_keys(kind, f"{prefix}{name}."))
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two config trees, sorted."""
    flat_a, flat_b = flatten(a), flatten(b)
    missing = object()
    return sorted(key for key in flat_a.keys() | flat_b.keys() if flat_a.get(key, missing) != flat_b.get(key, missing))


def fingerprint(*parts: Any) -> str:
    """Eight hex digits that change when any of the JSON-like parts does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
