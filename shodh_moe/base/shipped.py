"""Files that come with the package: the folders ``configs`` and ``examples``."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("configs", "examples")


def shipped_folder(name: str) -> Path:
    """Return the folder ``configs`` or ``examples``: in an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def shipped_file(path: Path) -> Path:
    """Return ``path``, or the package's own file if ``path`` is ``configs/...`` and does not exist."""
    if path.parts[:1] != ("configs",) or ".." in path.parts or path.exists():
        return path
    own = shipped_folder("configs").joinpath(*path.parts[1:])
    return own if own.is_file() else path
