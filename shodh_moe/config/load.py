"""Read a YAML file and overrides into a config."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.base.section import Section, section_of, with_old_values
from shodh_moe.base.shipped import shipped_file
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.config import Config

Kind = TypeVar("Kind", bound=Section)


def read_yaml(path: Path, remedy: str = "check --config") -> dict[str, Any]:
    """Read a YAML mapping; an empty file gives {}.

    A path ``configs/...`` that does not exist names a config that comes with the package.

    Args:
        remedy: end of the error message for a file that cannot be opened.

    Raises:
        UserError: the file is missing, is not a YAML mapping in UTF-8, or has a key twice.
    """
    try:
        tree = parse_yaml(shipped_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: give a YAML config") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")
    return tree


def load_config(path: Path | str, overrides: list[str] | None = None, name: str | None = None) -> Config:
    """Read the config of a latent transformer's run; see `load_config_of`."""
    return load_config_of(Config, path, overrides, name)


def load_config_of(
    kind: type[Kind],
    path: Path | str,
    overrides: list[str] | None = None,
    name: str | None = None,
    stored: bool = False,
) -> Kind:
    """Read a YAML config of class ``kind`` and apply ``key.sub=value`` overrides, then the run's name.

    Args:
        stored: this program wrote the file, perhaps an older version of it; see `with_old_values`.

    Raises:
        UserError: the file is missing or not a YAML mapping, an override has no ``=``, a key is unknown (the message
            names the nearest valid key), or a value has the wrong type or range.
    """
    tree = read_yaml(Path(path))
    if stored:
        tree = with_old_values(kind, tree)
    return config_of_tree(kind, tree, str(path), overrides, name)


def config_of_tree(
    kind: type[Kind], tree: dict[str, Any], source: str, overrides: list[str] | None = None, name: str | None = None
) -> Kind:
    """Apply overrides and the run's name to nested dictionaries, which they change, and make them a config.

    Args:
        source: where the dictionaries were written, for messages.

    Raises:
        UserError: as in `load_config_of`.
    """
    written_in: dict[str, str] = {}
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} must look like key.sub=value")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"override {override!r}: {error}") from None
        _set(tree, key, value)
        written_in[key] = f"override {override!r}"
    if name is not None:
        _set(tree, "name", name)
        written_in["name"] = f"--name {name!r}"
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, kind, source, written_in)) from None


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key, creating the sections around it."""
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _explain(error: ValidationError, kind: type[Section], file: str, written_in: dict[str, str]) -> str:
    """Describe the first mistake in one line: where it was written, the key, and the remedy."""
    mistakes = error.errors()
    # A misspelt required key is both unknown and missing; report the spelling.
    first = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])
    valid = _keys(kind)
    key = _written_key(first["loc"], valid)
    source = _source(key, file, written_in)
    if first["type"] == "extra_forbidden":
        near = _nearest(key, valid)
        remedy = f"the nearest valid key is {near!r}" if near else f"the sections are {', '.join(kind.model_fields)}"
        return f"{source}: unknown key {key!r}; {remedy}"
    if first["type"] == "missing":
        return f"{source}: key {key!r} is missing: add it"
    if first["type"] == "value_error":
        return f"{source}: {key or 'config'}: {first['msg'].removeprefix('Value error, ')}"
    # A key that accepts several types has one mistake per type.
    wanted = [_wanted(one) for one in mistakes if _written_key(one["loc"], valid) == key]
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{source}: {key or 'config'} should be {' or '.join(dict.fromkeys(wanted))}, not {shown}"


def _wanted(mistake: Any) -> str:
    """Describe the expected value of a key, for a sentence that begins with "should be"."""
    if mistake["type"] == "string_pattern_mismatch":
        return "a name of letters, digits and _ . + = - that starts with a letter, digit or _"
    if mistake["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a section of `key: value` lines"
    return str(mistake["msg"]).removeprefix("Input should be ").removeprefix("String should have ")


def _written_key(location: tuple[int | str, ...], valid: list[str]) -> str:
    """Return the key as the user wrote it, without the union member that pydantic appends."""
    parts: list[str] = []
    for part in location:
        prefix = ".".join(parts)
        leaf = prefix in valid and not any(key.startswith(f"{prefix}.") for key in valid)
        # Below a leaf, only list positions come from the user.
        if leaf and not isinstance(part, int):
            break
        parts.append(str(part))
    return ".".join(parts)


def _source(key: str, file: str, written_in: dict[str, str]) -> str:
    """Name the override that sets ``key``, a part of it or a section around it; without such an override, the file."""
    for written, text in reversed(written_in.items()):
        if f"{key}.".startswith(f"{written}.") or f"{written}.".startswith(f"{key}."):
            return text
    return file


def _nearest(key: str, valid: list[str]) -> str | None:
    """Return the valid key most similar to ``key``, or None.

    A sibling is preferred, then a key with the same last part, then any key.
    """
    parent = key.rpartition(".")[0]
    siblings = [k for k in valid if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    near = near or [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return near[0] if near else None


def _keys(kind: type[Section], prefix: str = "") -> list[str]:
    """List every dotted key of a config, including those that hold a section."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if inner := section_of(field):
            keys.extend(_keys(inner, f"{prefix}{name}."))
    return keys
