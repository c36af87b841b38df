"""A small process beside the launching one: if that is killed, it asks the ranks on all hosts to stop.

The launching process cannot do so itself after ``kill -9``, and the ranks would go on unnoticed, with the run locked.
Standard input is a pipe that only the launching process can write to, so its end tells when that process has ended. The
launching process first writes the process ID of the launcher, and ``done`` if it ends in order. Otherwise the ranks are
asked through the stop file (see `sentinel`): they write a checkpoint and end.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from shodh_moe.launching.sentinel import PAUSE_S, STOP

_DONE = "done"


class Guard:
    """The guard of one launcher, as the launching process sees it."""

    def __init__(self, stop_file: Path) -> None:
        command = [sys.executable, "-m", __name__, str(stop_file.absolute())]
        # A session of its own: signals to the launching process's group must not end it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def watch(self, launcher: int) -> None:
        """Tell the guard the process ID of the launcher, without which it does nothing."""
        self._write(f"{launcher}\n")

    def end(self) -> None:
        """End the guard."""
        self._write(_DONE)
        with suppress(OSError):
            self._process.communicate()

    def _write(self, text: str) -> None:
        assert self._process.stdin
        with suppress(OSError):  # somebody has ended the guard
            self._process.stdin.write(text)
            self._process.stdin.flush()


@contextmanager
def guarded(stop_file: Path) -> Iterator[Guard]:
    """Run a `Guard` for the time of the block."""
    guard = Guard(stop_file)
    try:
        yield guard
    finally:
        guard.end()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    stop_file = Path(sys.argv[1])
    launcher, _, rest = sys.stdin.read().partition("\n")
    if rest == _DONE or not launcher.isdecimal():
        return
    with suppress(OSError):
        print("shodh was killed: its ranks write a checkpoint and end", file=sys.stderr, flush=True)
    with suppress(psutil.Error):
        process = psutil.Process(int(launcher))
        # Again and again, because the disk may be full at first.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            with suppress(OSError):
                stop_file.write_text(STOP)
            time.sleep(PAUSE_S)
    with suppress(OSError):
        stop_file.unlink()


if __name__ == "__main__":
    main()
