"""A small process beside the ranks of a host, which acts when they cannot: a stopped or hung rank answers nobody.

It looks into the run folder, which all hosts share, and

- if a rank on any host has written `stall_mark`: has its host's ranks write their Python stacks, waking those that were
  stopped, then kills them;
- if whoever launched the job has written ``stop`` into the stop file: asks its host's ranks to write a checkpoint and
  end (SIGUSR1); if ``kill``: kills them.

It ends with the rank that started it. It imports nothing heavy: every host has one.
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
WAKING_S = 1.0  # that a stopped rank gets to write its stack
STOP, KILL = "stop", "kill"  # what a stop file says


def stall_mark(stacks: Path, attempt: str) -> Path:
    """The file by which a rank tells all hosts that this attempt at the run does not move."""
    return stacks / f"stalled-{attempt}"


def remove_marks(stacks: Path) -> None:
    """Of earlier attempts; nobody looks at them any more."""
    for path in stacks.glob("stalled-*"):
        path.unlink(missing_ok=True)


def register(stacks: Path, rank: int, attempt: str) -> None:
    """Leave word of this process, a rank, for the sentinel of its host."""
    me = psutil.Process()
    facts = {"attempt": attempt, "host": socket.gethostname(), "process": me.pid, "started": me.create_time()}
    (stacks / f"rank_{rank:05d}.json").write_text(json.dumps(facts))


def ranks_here(stacks: Path, attempt: str) -> list[psutil.Process]:
    """The live ranks of this host."""
    found = []
    for path in sorted(stacks.glob("rank_*.json")):
        with suppress(OSError, ValueError, KeyError, psutil.Error):
            facts: dict[str, Any] = json.loads(path.read_text())
            if (facts["attempt"], facts["host"]) == (attempt, socket.gethostname()):
                process = psutil.Process(facts["process"])
                # Hosts may share a name, and numbers of processes come again: what matters is that it is the same one.
                if process.create_time() == facts["started"]:
                    found.append(process)
    return found


def watch(stacks: Path, attempt: str, parent: int, stop_file: Path | None) -> None:
    """Until the parent process is gone, or the ranks have been killed."""
    asked = False
    while os.getppid() == parent:
        if stall_mark(stacks, attempt).exists():
            _send(stacks, attempt, signal.SIGUSR2, signal.SIGCONT)
            time.sleep(WAKING_S)
            _send(stacks, attempt, signal.SIGKILL)
            return
        told = ""
        if stop_file:
            with suppress(OSError):
                told = stop_file.read_text().strip()
        if told == KILL:
            _send(stacks, attempt, signal.SIGKILL)
            return
        if told == STOP and not asked:
            _send(stacks, attempt, signal.SIGUSR1)
            asked = True
        time.sleep(PAUSE_S)


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
    options = parser.parse_args()
    # What a terminal, a scheduler or a launcher sends to all processes is meant for the ranks.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    watch(options.stacks, options.attempt, options.parent, options.stop_file)


if __name__ == "__main__":
    main()
