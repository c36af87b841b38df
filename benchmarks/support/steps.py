"""The steps of `make gpu`: run a command with a time limit and record its outcome."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Step(NamedTuple):
    """A command to run as a process, unless a module in ``needs`` is missing."""

    name: str
    command: list[str]
    limit: float  # seconds
    environment: dict[str, str] = {}  # noqa: RUF012 (never changed)
    needs: tuple[str, ...] = ()
    folder: Path = ROOT
    read: Callable[[Path], dict[str, Any]] = lambda log: {}  # extracts the results from the log
    after: str = ""  # run only if this step succeeded


@dataclass
class Outcome:
    name: str
    status: str  # done, failed, timed out, not run
    seconds: float
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def run_step(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run one step for at most ``seconds``; its output is written to ``out``/<name>.log."""
    began = time.monotonic()
    log = out / f"{step.name.replace(' ', '_')}.log"
    step.folder.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        child = subprocess.Popen(
            step.command,
            cwd=step.folder,
            env=environment | step.environment,
            stdout=file,
            stderr=subprocess.STDOUT if step.name != "environment" else None,
            start_new_session=True,  # so that its children can be killed with it
        )
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    took = time.monotonic() - began
    found = Outcome(step.name, "done" if code == 0 else "failed", took)
    try:
        found.result = step.read(log)
    except Exception as error:
        found.reason = f"its output could not be read: {error}"
    if code is None:
        found.status, found.reason = "timed out", f"stopped after {took:.0f} s"
    elif code:
        found.reason = f"exit code {code}: {_last_line(log)}"
    return found


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
