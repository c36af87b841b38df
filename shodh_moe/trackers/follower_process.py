"""The process that sends a run's records to a tracker, as its training sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any

from shodh_moe.base.lock import Held, take_lock
from shodh_moe.trackers.tracker import TrackedRun

LONGEST_END_S = 150.0  # the process itself gives up earlier


class FollowerProcess:
    """A `follower` of its own. Nothing that happens to it is an error of the training."""

    def __init__(self, name: str, run: TrackedRun, report: bool = False):
        self._name, self._process = name, None
        command: dict[str, Any] = {
            "name": name,
            "folder": str(run.folder.resolve()),
            "telemetry": run.telemetry.model_dump(),
            "report": report,
        }
        lock = self._free_lock(name, run)
        command["lock"] = lock.fileno() if lock else None
        try:
            # In a session of its own, because signals for the training must not end it before it has sent everything.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shodh_moe.trackers.follower"],
                stdin=subprocess.PIPE,
                start_new_session=True,
                pass_fds=[lock.fileno()] if lock else [],
            )
            self._say(json.dumps(command))
        except OSError as error:
            print(f"warning: {name} is not used: its process does not start ({error})", flush=True)
        finally:
            if lock:
                lock.close()  # the process has it now

    def _free_lock(self, name: str, run: TrackedRun) -> IO[str] | None:
        """Take the process's lock before it starts, so that it is held from now on; None if an earlier one has it."""
        path = run.own_folder / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Held):
            return take_lock(path)
        return None

    _process: subprocess.Popen[bytes] | None

    def end(self, finished: bool) -> None:
        """Tell the process that the training has ended, or was stopped; it then sends what is left, and ends."""
        if self._process and self._process.stdin:
            if finished:
                self._say("finished")
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self) -> None:
        """Wait until the process has ended, at most `LONGEST_END_S`; then end it."""
        if self._process:
            try:
                self._process.wait(LONGEST_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
