"""Ends a job that hangs, and leaves every rank's Python stack behind."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from shodh_moe.errors import EXIT_FAILED

WAKING_S = 1.0  # that a stopped rank gets to write its stack


class Watchdog:
    """Call `alive` at least every ``seconds``, or the process writes its stack and ends with `EXIT_FAILED`.

    Every rank has one. The rank that notices first also has the others of its host write their stacks, and wakes them
    for it if they were stopped. What a launcher does when one rank ends is end the others.

    Args:
        seconds: 0 switches it off.
    """

    def __init__(self, run: Path, rank: int, seconds: float):
        self.seconds, self._rank = seconds, rank
        if not seconds:
            return
        self._folder = run / "stacks"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / f"rank_{rank:05d}.txt", "w")  # noqa: SIM115 - must be open when all else fails
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        who = {"host": socket.gethostname(), "process": os.getpid()}
        (self._folder / f"rank_{rank:05d}.json").write_text(json.dumps(who))
        self._ended = threading.Event()
        self.alive()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """There is progress."""
        if self.seconds:
            self._last = time.monotonic()

    def stop(self) -> None:
        """The work is over."""
        if self.seconds:
            self._ended.set()

    def _watch(self) -> None:
        pause = min(self.seconds / 10, 1.0)
        looked = time.monotonic()
        while not self._ended.wait(pause):
            now = time.monotonic()
            # The clock goes on while a scheduler suspends a job: this rank was stopped itself, and gets its time anew.
            if now - looked > 5 * pause + 1:
                self._last = now
            looked = now
            if now - self._last > self.seconds:
                self._bark()

    def _bark(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        text = f"error on rank {self._rank}: no progress for {self.seconds:g} s: the stacks of the ranks are in"
        print(f"{text} {self._folder}", file=sys.stderr, flush=True)
        for path in self._folder.glob("rank_*.json"):
            with suppress(OSError, ValueError, KeyError):
                who = json.loads(path.read_text())
                if who["host"] == socket.gethostname() and who["process"] != os.getpid():
                    os.kill(who["process"], signal.SIGUSR2)
                    os.kill(who["process"], signal.SIGCONT)
        time.sleep(WAKING_S)
        os._exit(EXIT_FAILED)
