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

from shodh_moe.base.files import write_text

PAUSE_S = 0.5
WAKING_S = 1.0  # time for a suspended rank to write its stack
STOP_FILE = ".stop-"  # its name in the run folder begins so, and goes on with the name of the attempt
STOP, KILL = "stop", "kill"  # its contents


def stall_mark(stacks: Path, attempt: str) -> Path:
    """Return the file that tells all hosts that this attempt at the run is stalled."""
    return stacks / f"stalled-{attempt}"


def attempt_of(stop_file: Path) -> str:
    """Return what identifies an attempt on all ranks before they have met."""
    return stop_file.name.removeprefix(STOP_FILE)


def clear(run: Path, attempt: str) -> None:
    """Remove what earlier attempts have left in a run folder, which this attempt must have locked."""
    for pattern in (f"{STOP_FILE}*", "stacks/stalled-*", "stacks/rank_*.json"):
        for path in run.glob(pattern):
            if attempt not in path.name:
                path.unlink(missing_ok=True)
    for path in run.glob("stacks/rank_*.txt"):
        os.truncate(path, 0)


def register(stacks: Path, rank: int, attempt: str, stoppable: bool) -> None:
    """Register this process, a rank, with the sentinel of its host.

    Args:
        stoppable: SIGUSR1 makes the rank write a checkpoint and end.
    """
    me = psutil.Process()
    facts = {"host": socket.gethostname(), "process": me.pid, "started": me.create_time(), "stoppable": stoppable}
    write_text(stacks / f"rank_{rank:05d}-{attempt}.json", json.dumps(facts))


def ranks_here(stacks: Path, attempt: str) -> list[tuple[psutil.Process, bool]]:
    """Return the live ranks of this host, and for each whether it is stoppable."""
    found = []
    for path in sorted(stacks.glob(f"rank_*-{attempt}.json")):
        with suppress(OSError, ValueError, KeyError, psutil.Error):
            facts: dict[str, Any] = json.loads(path.read_text())
            if facts["host"] == socket.gethostname():
                process = psutil.Process(facts["process"])
                # Hosts may share a name, and process IDs are reused, so compare the start times.
                if process.create_time() == facts["started"]:
                    found.append((process, facts["stoppable"]))
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
            asked = all(stoppable for _, stoppable in ranks_here(stacks, attempt))
            if asked:  # otherwise they are starting, and the signal would kill them
                _send(stacks, attempt, signal.SIGUSR1)
        time.sleep(PAUSE_S)


def _parent_of(process: int) -> int | None:
    with suppress(psutil.Error):
        return psutil.Process(process).ppid()
    return None


def _send(stacks: Path, attempt: str, *signals: signal.Signals) -> None:
    for process, _ in ranks_here(stacks, attempt):
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
