"""Run Python source on other hosts over ssh. No shell sees the source or an unquoted argument."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from shodh_moe.base.errors import UserError

SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=8"]


@dataclass(frozen=True)
class Answer:
    """The output of a host's Python, or one line that says why there is none."""

    host: str
    output: str
    error: str


def run_on_hosts(
    hosts: list[str], source: str, arguments: list[str] | None = None, timeout_seconds: float = 10.0
) -> list[Answer]:
    """Run ``source`` on all hosts in parallel, with the interpreter at the same path as this one.

    Args:
        arguments: ``sys.argv[1:]`` of the source.
        timeout_seconds: time limit for all hosts together.

    Raises:
        UserError: this host has no ssh.
    """
    if not shutil.which("ssh"):
        raise UserError("no ssh on this host's PATH: install an OpenSSH client")
    command = shlex.join([sys.executable, "-", *(arguments or [])])
    deadline = time.monotonic() + timeout_seconds
    started = [
        subprocess.Popen(
            [*SSH, "--", host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    ]
    for process in started:  # all hosts start before we wait for the first one
        assert process.stdin
        try:
            process.stdin.write(source)
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdin = None  # `communicate` would flush it again
    return [_answer(host, process, deadline, timeout_seconds) for host, process in zip(hosts, started, strict=True)]


def _answer(host: str, process: subprocess.Popen[str], deadline: float, timeout_seconds: float) -> Answer:
    try:
        output, error = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Answer(host, "", f"no answer within {timeout_seconds:g} s")
    if process.returncode == 0:
        return Answer(host, output, "")
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    # The last line has the reason: of ssh's own failures (code 255), of a shell without the interpreter, and of Python.
    return Answer(host, output, (lines[-1] if lines else f"exit code {process.returncode}")[:200])
