"""Find the checkpoint that a path names: a checkpoint folder, a run folder, or a run's ``checkpoints`` folder."""

from __future__ import annotations

import re
from pathlib import Path

from shodh_moe.checkpoint.read import damage, find_checkpoint, list_checkpoints
from shodh_moe.checkpoint.state import STATE, Damaged


def checkpoints_at(path: Path) -> list[Path] | None:
    """List the checkpoint folders that ``path`` names, oldest first, without reading them.

    Returns:
        The checkpoints of a run, [] if it has none yet; ``path`` alone if it is a checkpoint; None if it is neither.
    """
    for folder in (path, path / "checkpoints"):
        if steps := list_checkpoints(folder):
            return [folder / str(step) for step in steps]
    if path.is_dir() and ((path / STATE).exists() or re.fullmatch(r"\d+", path.resolve().name, re.ASCII)):
        return [path]
    return [] if (path / "checkpoints").is_dir() else None


def resolve_checkpoint(path: Path) -> Path | None:
    """Return the intact checkpoint that ``path`` names: the newest one of a run, or the checkpoint at ``path``.

    All files of the checkpoint are read to verify their hashes, so only one rank should call this.

    Returns:
        The checkpoint's folder; None for a run without checkpoints.

    Raises:
        Damaged: ``path`` is neither a run nor an intact checkpoint.
        UserError: it is a run, but none of its checkpoints can be used.
    """
    found = checkpoints_at(path)
    if found and found != [path]:
        newest = find_checkpoint(found[0].parent)
        return newest[0] if newest else None
    if found == []:
        return None
    if reason := damage(path):
        raise Damaged(reason)
    return path
