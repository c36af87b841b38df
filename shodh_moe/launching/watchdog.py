"""End a job that hangs, after writing every rank's Python stack."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from shodh_moe.base.errors import EXIT_FAILED
from shodh_moe.launching import sentinel
from shodh_moe.launching.rank_variables import watched_launcher

WRITING_S = 10.0  # time limit for writing the stack: the host may have lost the network disk of the run folder


class Watchdog:
    """Writes this process's stack and ends it with `EXIT_FAILED` if `alive` is not called for ``seconds``.

    Every rank has a watchdog, and the first rank of each host starts a `sentinel`. The rank that notices first leaves a
    mark in the run folder. The sentinels then make all other ranks write their stacks, even suspended ones, and kill
    them.

    Args:
        run: the run folder; stacks are written to its folder ``stacks``.
        attempt: identifies this start of the run; equal on all ranks.
        local_rank: 0 starts the sentinel.
        seconds: 0 switches the watchdog off; the sentinel still obeys the stop file.
        stop_file: see `sentinel`.
    """

    def __init__(
        self, run: Path, rank: int, local_rank: int, attempt: str, seconds: float, stop_file: Path | None = None
    ):
        self.seconds, self.attempt, self._rank = seconds, attempt, rank
        self._folder = run / "stacks"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()
        with ExitStack() as resources:
            # Opened now, because opening it may fail once the job hangs.
            self._file = resources.enter_context(open(self._folder / f"rank_{rank:05d}.txt", "a"))
            faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
            resources.callback(faulthandler.unregister, signal.SIGUSR2)
            sentinel.register(self._folder, rank, attempt, stoppable=False)
            if local_rank == 0:
                command = [sys.executable, "-m", sentinel.__name__, str(self._folder), attempt, str(os.getpid())]
                command += ["--stop-file", str(stop_file)] if stop_file else []
                command += ["--launcher", str(launcher)] if (launcher := watched_launcher()) else []
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
                resources.callback(process.wait)
                resources.callback(process.kill)
            self.alive()
            if seconds:
                threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            self._resources = resources.pop_all()

    def accept_stops(self) -> None:
        """Say that from now on SIGUSR1 makes this rank write a checkpoint and end; before, it would kill the rank."""
        sentinel.register(self._folder, self._rank, self.attempt, stoppable=True)
        self.alive()

    def alive(self) -> None:
        """Report progress."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Stop watching, and end the sentinel."""
        self._ended.set()
        self._resources.close()

    def _watch(self) -> None:
        pause = min(self.seconds / 10, 1.0)
        last_check = time.monotonic()
        while not self._ended.wait(pause):
            now = time.monotonic()
            # The clock keeps running while a scheduler suspends the job. After such a gap the full time starts again.
            if now - last_check > 5 * pause + 1:
                self._last = now
            last_check = now
            if now - self._last > self.seconds:
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        text = f"error on rank {self._rank}: no progress for {self.seconds:g} s: the stacks of the ranks are in"
        print(f"{text} {self._folder}", file=sys.stderr, flush=True)
        writing = threading.Thread(target=self._write_stack, daemon=True)
        writing.start()
        writing.join(WRITING_S)
        time.sleep(2 * sentinel.PAUSE_S + sentinel.WAKING_S)  # let this host's sentinel act: it ends with its rank
        os._exit(EXIT_FAILED)

    def _write_stack(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        with suppress(OSError):
            sentinel.stall_mark(self._folder, self.attempt).touch()
