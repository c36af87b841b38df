"""Other processes of this host, as far as the system shows them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def ancestors() -> list[psutil.Process]:
    """Return this process's parent, its parent, and so on, up to the first one that the system hides.

    Linux hides other users' processes where /proc is mounted with ``hidepid``.
    """
    import psutil

    found: list[psutil.Process] = []
    with suppress(psutil.Error, OSError):
        process = psutil.Process().parent()
        while process:
            found.append(process)
            process = process.parent()
    return found


def command_line(process: psutil.Process) -> list[str]:
    """Return the words of a process's command line; [] if it has ended or the system hides them."""
    import psutil

    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []
