"""Python source run on other hosts over ssh: nothing of it, nor of its arguments, is read by a shell unquoted."""

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
    """What a host's Python printed; or in one line why nothing useful came."""

    host: str
    output: str
    error: str


def run_on_hosts(
    hosts: list[str], source: str, arguments: list[str] | None = None, timeout_seconds: float = 10.0
) -> list[Answer]:
    """Run ``source`` on every host at once, with the interpreter that has this one's path there.

    Args:
        arguments: ``sys.argv[1:]`` of the source.
        timeout_seconds: for all of them together.

    Raises:
        UserError: there is no ssh here.
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
    for process in started:  # all of them begin before the first is waited for
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
    # ssh's own failures end with 255; a shell without the interpreter says so in its last line, as Python does.
    return Answer(host, output, (lines[-1] if lines else f"exit code {process.returncode}")[:200])
