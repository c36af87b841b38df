"""A small process on each host that acts when the ranks cannot: a suspended or hung rank does not respond.

It watches the run folder, which all hosts share.

- Once a rank on any host has written `stall_mark`, it makes the ranks of its host write their Python stacks, waking
  suspended ones, and then kills them.
- Once the launching process has written ``stop`` to the stop file, it asks the ranks of its host to write a checkpoint
  and end (SIGUSR1). On ``kill`` it kills them.
- Once the launcher of its host's ranks is gone without having ended them, it asks them likewise.

It ends with the rank that started it, and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PAUSE_S = 0.5
WAKING_S = 1.0  # time for a suspended rank to write its stack
STOP, KILL = "stop", "kill"  # contents of a stop file


def stall_mark(stacks: Path, attempt: str) -> Path:
    """Return the file that tells all hosts that this attempt at the run is stalled."""
    return stacks / f"stalled-{attempt}"


def remove_marks(stacks: Path) -> None:
    """Remove the stall marks of earlier attempts."""
    for path in stacks.glob("stalled-*"):
        path.unlink(missing_ok=True)


def remove_stop_files(run: Path, keep: Path | None = None) -> None:
    """Remove the stop files of earlier attempts from a run folder, which this attempt must have locked."""
    for path in run.glob(".stop-*"):
        if keep is None or path.name != keep.name:
            path.unlink(missing_ok=True)


def register(stacks: Path, rank: int, attempt: str) -> None:
    """Register this process, a rank, with the sentinel of its host."""
    me = psutil.Process()
    facts = {"attempt": attempt, "host": socket.gethostname(), "process": me.pid, "started": me.create_time()}
    (stacks / f"rank_{rank:05d}.json").write_text(json.dumps(facts))


def ranks_here(stacks: Path, attempt: str) -> list[psutil.Process]:
    """Return the live ranks of this host."""
    found = []
    for path in sorted(stacks.glob("rank_*.json")):
        with suppress(OSError, ValueError, KeyError, psutil.Error):
            facts: dict[str, Any] = json.loads(path.read_text())
            if (facts["attempt"], facts["host"]) == (attempt, socket.gethostname()):
                process = psutil.Process(facts["process"])
                # Hosts may share a name, and process IDs are reused, so compare the start times.
                if process.create_time() == facts["started"]:
                    found.append(process)
    return found


def watch(stacks: Path, attempt: str, parent: int, stop_file: Path | None, launcher: int | None = None) -> None:
    """Watch until the parent process has ended or the ranks have been killed.

    Args:
        parent: process ID of the rank that started the sentinel.
        launcher: process ID of that rank's parent; None to ignore its end.
    """
    asked = False
    while os.getppid() == parent:
        if stall_mark(stacks, attempt).exists():
            _send(stacks, attempt, signal.SIGUSR2, signal.SIGCONT)
            time.sleep(WAKING_S)
            _send(stacks, attempt, signal.SIGKILL)
            return
        order = ""
        if stop_file:
            with suppress(OSError):
                order = stop_file.read_text().strip()
        if order == KILL:
            _send(stacks, attempt, signal.SIGKILL)
            return
        if not asked and (order == STOP or (launcher and _parent_of(parent) not in (launcher, None))):
            _send(stacks, attempt, signal.SIGUSR1)
            asked = True
        time.sleep(PAUSE_S)


def _parent_of(process: int) -> int | None:
    with suppress(psutil.Error):
        return psutil.Process(process).ppid()
    return None


def _send(stacks: Path, attempt: str, *signals: signal.Signals) -> None:
    for process in ranks_here(stacks, attempt):
        for number in signals:
            with suppress(psutil.Error):
                process.send_signal(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stacks", type=Path)
    parser.add_argument("attempt")
    parser.add_argument("parent", type=int)
    parser.add_argument("--stop-file", type=Path)
    parser.add_argument("--launcher", type=int)
    options = parser.parse_args()
    # Signals that a terminal, scheduler or launcher sends to all processes are meant for the ranks.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    watch(options.stacks, options.attempt, options.parent, options.stop_file, options.launcher)


if __name__ == "__main__":
    main()
