"""Files that are either complete or not there."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shodh_moe.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; on success fsync it and rename it to ``path``.

    On any failure the temporary file is removed and ``path`` stays as it was.

    Raises:
        UserError: the disk is full, the folder is read-only or cannot be made.
    """
    # The leading dot and the ending keep a leftover of a killed run from being taken for data.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {_reason(error)}; free some space there or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _reason(error: OSError) -> str:
    # HDF5 wraps the system's message in a paragraph of its own.
    inner = re.search(r"error message = '([^']+)'", str(error))
    return inner[1] if inner else error.strerror or " ".join(str(error).split())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, older_than_seconds: float = 3600.0) -> None:
    """Remove temporary files that killed runs left in ``folder``; a fresh one may belong to a run beside this one."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                path.unlink()
