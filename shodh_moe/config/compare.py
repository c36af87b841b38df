"""Compare two configs key by key, and fingerprint settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from shodh_moe.base.section import first_changed, with_old_values
from shodh_moe.config import ModelConfig


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ between two config trees, sorted."""
    flat_a, flat_b = flatten(a), flatten(b)
    missing = object()
    return sorted(key for key in flat_a.keys() | flat_b.keys() if flat_a.get(key, missing) != flat_b.get(key, missing))


def differing_model_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the keys of two ``model`` sections with different values that make the same weights a different model.

    A key that a section lacks has its default value, or the one that older versions without this key had.
    """
    defaults = flatten(ModelConfig().model_dump())
    a, b = (defaults | flatten(with_old_values(ModelConfig, one)) for one in (a, b))
    differing = differing_keys(a, b)
    return [key for key in differing if first_changed(ModelConfig, key) not in ("run", "nothing")]


def fingerprint(*parts: Any) -> str:
    """Hash JSON-like values to eight hexadecimal digits, the first of their SHA-256."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
