"""Start a command on one of the hosts, and follow it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.support.hosts import Host, Hosts

ROOT = Path(__file__).parents[2]


class Launch:
    """A command that runs on a host, with its output in a file."""

    def __init__(self, host: Host, config: Path, run: str, *command: str, **environment: str):
        self.run = config.parent / "runs" / run
        self._printed = config.parent / f"{run}.log"
        environment["DS_ENV_FILE"] = str(config.parent / "deepspeed_env")
        self._host = host
        with self._printed.open("w") as output:
            self._process = subprocess.Popen(
                host.command(*command, "--config", str(config), "--name", run, folder=ROOT, **environment),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def printed(self) -> str:
        return self._printed.read_text(errors="replace")

    def end(self, seconds: float = 120) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within {seconds:g} s: {self._host.processes()}\n{self.printed()}")

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def until_training(self) -> None:
        log = self.run / "metrics.jsonl"
        self.until(lambda: log.exists() and log.stat().st_size)


def check_all_gone(hosts: Hosts, deadline: float) -> None:
    while left := [(host.name, process) for host in hosts.all for process in host.processes()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
