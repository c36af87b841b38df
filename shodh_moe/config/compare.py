"""Telling two configs apart: the keys that differ, and a fingerprint of settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any


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


# Model settings that neither shape the weights nor change a prediction, in which no token is dropped.
_FREE_OF_MODEL = {
    "moe.dropless",
    "moe.capacity_factor",
    "moe.min_capacity",
    "moe.drop_order",
    "moe.router.frozen",
    "moe.router.temperature",
    "moe.router.balance_weight",
    "moe.router.z_weight",
}


def differing_model_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys of two ``model`` sections whose values make the same weights another model."""
    return [key for key in differing_keys(a, b) if key not in _FREE_OF_MODEL]


def fingerprint(*parts: Any) -> str:
    """Eight hex digits that change when any of the JSON-like parts does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
