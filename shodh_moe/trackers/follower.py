"""Send the records of a run to one tracker, from its metrics.jsonl: the program of a tracker's own process.

A process of its own keeps a slow server, a library that hangs or a crash of it away from the training. metrics.jsonl is
its queue, so nothing is lost while a server does not answer. `follower_process` starts it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.lock import Held
from shodh_moe.base.records import METRICS, Tail
from shodh_moe.config import TelemetryConfig
from shodh_moe.trackers.facts import evaluation_of, report_files
from shodh_moe.trackers.scalars import results_of
from shodh_moe.trackers.sender import Sender
from shodh_moe.trackers.state import load_state, take_tracker_lock
from shodh_moe.trackers.tracker import TrackedRun, make_tracker

POLL_S = 1.0  # between two looks at metrics.jsonl
RETRY_S = (5.0, 300.0)  # the first and the longest wait after a failure; it doubles from one to the other
END_S = 120.0  # for what is left after the training has ended
KILLED_S = 15.0  # the same if it was stopped or killed
LOCK_S = 130.0  # for the process of an earlier start to end
BATCH = 200  # records that are sent together
NICE = 5


class Follower:
    """Sends what a tracker lacks. After an error, `send_new` begins anew with what the tracker has not got.

    Args:
        lock: the lock of `lock_tracker`, if it is held already.
    """

    def __init__(self, name: str, run: TrackedRun, lock: IO[str] | None = None):
        self._name, self._run, self._sender = name, run, None
        self._tail: Tail
        self._lock = lock or lock_tracker(run, name)

    _sender: Sender | None

    def open(self) -> Sender:
        """Connect to the tracker, unless that is done already. Raises whatever its library raises."""
        if self._sender is None:
            sender = Sender(make_tracker(self._name, self._run))
            self._state, self._tail = load_state(self._run, self._name), Tail(self._run.folder / METRICS)
            self._sender = sender
        return self._sender

    def send_new(self) -> int:
        """Send the records that the tracker lacks, and return their number. Raises whatever its library raises."""
        sender = self.open()
        try:
            records = self._tail.read()
            new = [record for record in records if self._state.is_new(record)]
            sender.know(record for record in records if not self._state.is_new(record))
            for first in range(0, len(new), BATCH):
                sender.send(new[first : first + BATCH])
                self._state.mark_sent(new[first : first + BATCH])
            return len(new)
        except BaseException:
            self._sender = None
            raise

    def end(self, finished: bool, report: bool = False) -> int:
        """Send what is left, with ``report`` the evaluation and the report too; end the tracker, and let others send.

        Returns:
            the number of records sent.
        """
        try:
            count = self.send_new()
            sender = self.open()
            sender.draw_last()
            if report:
                metrics, folder = evaluation_of(self._run.folder), self._run.folder
                sender.tracker.add_report((int(metrics.get("step") or 0), results_of(metrics)), report_files(folder))
            sender.tracker.close(finished)
        finally:
            self._lock.close()
        return count


def lock_tracker(run: TrackedRun, name: str) -> IO[str]:
    """Wait for the lock of `take_tracker_lock`, and take it.

    Raises:
        UserError: another process has held it for `LOCK_S`.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return take_tracker_lock(run, name)
        except Held as holder:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{run.folder} is being sent to {name} by another process ({str(holder) or 'unknown'}): it sends "
                    "all records, so wait for its end"
                ) from None
            time.sleep(POLL_S / 4)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def main() -> int:
    """Follow a run as the first line of standard input says, until its end; then send what is left.

    The line is JSON with ``name``, ``folder``, ``telemetry``, ``report`` and ``lock``, the descriptor of a file that is
    locked already, or null. A second line, ``finished``, says that the training has ended; without it, it was stopped
    or killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the training, which ends this process
        signal.signal(number, lambda *_: None)
    os.nice(NICE)
    command, data = _first_line()
    run = TrackedRun(Path(command["folder"]), TelemetryConfig.model_validate(command["telemetry"]))
    name, told = command["name"], False
    lock = os.fdopen(command["lock"], "w") if command["lock"] else None
    terminal = _redirect_output(run.own_folder / f"{name}.log")

    def warn(error: BaseException) -> None:
        nonlocal told
        if not told:
            text = f"{reason_of(error)}; the training goes on. What is missing is sent as soon as possible, or later by"
            with suppress(ValueError, OSError):  # closed, or nobody reads it
                print(f"warning: {name}: {text} `shodh track {run.folder}`", file=terminal, flush=True)
        told = True

    follower, wait, due = None, 0.0, 0.0
    ended = finished = False
    while not ended:
        if select.select([0], [], [], POLL_S)[0]:
            more = os.read(0, 4096)
            ended, data = not more, data + more
            if ended:
                finished = data.strip() == b"finished"
                seconds = END_S if finished else KILLED_S
                if not command["report"]:
                    terminal.close()  # whoever reads the training's output must not wait for this process
                threading.Thread(target=_stop_late, args=(seconds, warn), daemon=True).start()
        if time.monotonic() < due and not ended:
            continue
        try:
            follower = follower or Follower(name, run, lock)
            follower.send_new()
            wait = 0.0
            if ended:
                follower.end(finished, command["report"])
        except Exception as error:  # a tracker's library may raise anything
            warn(error)
            wait = min(max(2 * wait, RETRY_S[0]), RETRY_S[1])
            due = time.monotonic() + wait
    return int(told)


def _first_line() -> tuple[dict[str, Any], bytes]:
    """Return the first line of standard input, and what was read beyond it."""
    data = b""
    while b"\n" not in data:
        more = os.read(0, 4096)
        if not more:
            raise SystemExit(1)  # the training ended while it started this process
        data += more
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def _redirect_output(path: Path) -> IO[str]:
    """Send what libraries print to a file, and return the terminal for our own messages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    return terminal


def _stop_late(seconds: float, warn: Callable[[BaseException], None]) -> None:
    time.sleep(seconds)
    warn(TimeoutError(f"it has not taken the last records within {seconds:.0f} s"))
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
