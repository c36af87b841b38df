"""A lock that allows one training at a time in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from shodh_moe.base.errors import UserError
from shodh_moe.base.lock import RUN_LOCK, Held, take_lock


def lock_run(run: Path) -> IO[str]:
    """Keep other trainings out of a run folder until the returned file is closed or this process ends.

    Raises:
        UserError: another process holds the lock (the message says which, and since when), or the file cannot be
            written.
    """
    try:
        return take_lock(run / RUN_LOCK)
    except Held as holder:
        raise UserError(
            f"run folder {run} is being trained by another process ({str(holder) or 'unknown'}): wait for it, end it, "
            "or choose another name (NAME=... or --name)"
        ) from None
