"""Ends a job that hangs, and leaves every rank's Python stack behind."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shodh_moe.base.errors import EXIT_FAILED
from shodh_moe.launching import sentinel

WRITING_S = 10.0  # after which a run folder that takes no stack is not waited for: its host may have lost the network


class Watchdog:
    """Call `alive` at least every ``seconds``, or the process writes its stack and ends with `EXIT_FAILED`.

    Every rank has one, and the first rank of each host starts a `sentinel`. The rank that notices first leaves a mark
    in the run folder; the sentinels then have all the others write their stacks, also those that were stopped, and end
    them.

    Args:
        attempt: equal on all ranks and new at each start of the run.
        local_rank: 0 starts the sentinel.
        seconds: 0 switches the watchdog off; the sentinel still passes on what the stop file says.
        stop_file: see `sentinel`.
    """

    def __init__(self, run: Path, rank: int, local_rank: int, attempt: str, seconds: float, stop_file: Path | None):
        self.seconds, self._rank, self._attempt = seconds, rank, attempt
        self._folder = run / "stacks"
        self._folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            sentinel.remove_marks(self._folder)
        self._file = open(self._folder / f"rank_{rank:05d}.txt", "w")  # noqa: SIM115 - must be open when all else fails
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        sentinel.register(self._folder, rank, attempt)
        self._sentinel: subprocess.Popen[bytes] | None = None
        if local_rank == 0:
            command = [sys.executable, "-m", sentinel.__name__, str(self._folder), attempt, str(os.getpid())]
            command += ["--stop-file", str(stop_file)] if stop_file else []
            self._sentinel = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._ended = threading.Event()
        self.alive()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """The work is over."""
        self._ended.set()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        if self._sentinel:
            self._sentinel.kill()
            self._sentinel.wait()

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
        text = f"error on rank {self._rank}: no progress for {self.seconds:g} s: the stacks of the ranks are in"
        print(f"{text} {self._folder}", file=sys.stderr, flush=True)
        writing = threading.Thread(target=self._tell, daemon=True)
        writing.start()
        writing.join(WRITING_S)
        time.sleep(2 * sentinel.PAUSE_S + sentinel.WAKING_S)  # for the sentinel of this host, which ends with its rank
        os._exit(EXIT_FAILED)

    def _tell(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        with suppress(OSError):
            sentinel.stall_mark(self._folder, self._attempt).touch()


@contextmanager
def watched(
    run: Path, rank: int, local_rank: int, attempt: str, seconds: float, stop_file: Path | None
) -> Iterator[Watchdog]:
    """A `Watchdog` for the time of the block."""
    watchdog = Watchdog(run, rank, local_rank, attempt, seconds, stop_file)
    try:
        yield watchdog
    finally:
        watchdog.stop()
