"""A home folder for processes without one, as in containers whose user has no passwd entry. Imports nothing heavy."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def ensure_home() -> None:
    """Set HOME to a private temporary folder if this user has no home folder.

    Libraries keep what they compile under ``~``. Without a home folder they would make a folder named ``~`` where the
    command runs, or fail.
    """
    home = os.path.expanduser("~")
    if os.path.isabs(home) and os.path.isdir(home) and (home != "/" or os.access(home, os.W_OK)):
        return
    with suppress(OSError):
        os.environ["HOME"] = str(_private_folder())


def _private_folder() -> Path:
    """Return a folder that only this user can write to: the same one each time, unless somebody else has made it."""
    folder = Path(tempfile.gettempdir(), f"shodh_home_{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="shodh_home_"))
