"""What a run folder says of a run besides its records: config, environment, last evaluation, files of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.config.compare import flatten

# Those that a tracker gets at the start of a training.
START_FILES = ("config.yaml", "environment.json")


def settings_of(run: Path) -> dict[str, Any]:
    """Return the config of a run with dotted keys; {} if it is missing or damaged."""
    try:
        found = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return flatten(found) if isinstance(found, dict) else {}


def commit_of(run: Path) -> str:
    """Return the git commit of the source that a run was trained with; "" if it is unknown."""
    return str(_read_json(run / "environment.json").get("commit") or "")


def evaluation_of(run: Path) -> dict[str, Any]:
    """Return the content of ``metrics.json``; {} if it is missing or damaged."""
    return _read_json(run / "metrics.json")


def start_files(run: Path) -> list[Path]:
    """Return the files that say what is trained, those that exist."""
    return [run / name for name in START_FILES if (run / name).is_file()]


def report_files(run: Path) -> list[Path]:
    """Return metrics.json and the files of the report, those that exist."""
    found = [run / "metrics.json", *sorted((run / "report").glob("*"))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
