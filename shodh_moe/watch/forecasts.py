"""Keep pictures of a run's newest checkpoint, drawn by one process after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from shodh_moe.checkpoint import list_checkpoints

POLL_S = 2.0
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Forecasts:
    """Draws a forecast of every new checkpoint in a thread of its own, until `stop`.

    Args:
        every: draw again only after at least this many steps.

    Attributes:
        now: ``step``, ``domains`` and ``error`` of what is shown.
    """

    def __init__(self, run: Path, folder: Path, every: int):
        self._run, self._folder, self._every = run, folder, every
        self.now: dict[str, Any] = {"step": None, "domains": [], "error": ""}
        self._tried, self._stop = -1, threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def picture(self, domain: str) -> bytes | None:
        """Return the PNG of a domain; None if there is none."""
        return (self._folder / f"{domain}.png").read_bytes() if domain in self.now["domains"] else None

    def stop(self) -> None:
        """End the thread and its process."""
        self._stop.set()
        if self._process:
            self._process.kill()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            steps = list_checkpoints(self._run / "checkpoints")
            if steps and steps[-1] != self._tried and (self._tried < 0 or abs(steps[-1] - self._tried) >= self._every):
                self._tried = steps[-1]
                self._draw()

    def _draw(self) -> None:
        command = [sys.executable, "-m", "shodh_moe.watch.forecast", str(self._run), str(self._folder)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **THREADS}
        )
        out, error = self._process.communicate()
        try:
            self.now = {**self.now, "error": "", **json.loads(out.strip().splitlines()[-1])}
        except (IndexError, ValueError):
            lines = error.strip().splitlines() or ["its process was ended"]
            self.now = {**self.now, "error": lines[-1]}
