"""JSON files of results, each with a key that says what the result was computed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shodh_moe.base.files import finite_json, write_text


def read_result(path: Path, key: str) -> dict[str, Any] | None:
    """Read a file that `write_result` wrote; None if it is missing, damaged or has another key."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return dict(found) if isinstance(found, dict) and found.get("key") == key else None


def write_result(path: Path, key: str, found: dict[str, Any]) -> None:
    """Write a result with its key, and its folder if that is missing; NaN and infinity become null.

    Args:
        key: hash of everything that the result depends on; replaces one that ``found`` may have from another result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(finite_json({**found, "key": key}), indent=1) + "\n")
