"""Run Python scripts on other hosts, through the ssh command that pdsh, DeepSpeed's launcher, will use.

Every call has one time limit, however many hosts there are, and runs at most `AT_ONCE` processes at a time. No shell
sees a script or an unquoted argument.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO

from shodh_moe.base.errors import UserError
from shodh_moe.base.progress import progress

AT_ONCE = 32  # number of ssh processes: more would overload this machine and the hosts' shared file system
# Without the last two options a host that disappears would block ssh for the two hours that TCP waits by default.
SSH_OPTIONS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=8"]
SSH_OPTIONS += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
_PDSH_ARGUMENTS = "-2 -a -x %h"  # pdsh's default of PDSH_SSH_ARGS
TIME_VARIABLE = "SHODH_HOST_SECONDS"


@dataclass(frozen=True)
class Answer:
    """The output of a host's Python, or one line that says why there is none.

    Attributes:
        sent, received: when the process started and ended, in seconds since 1970.
    """

    host: str
    output: str
    error: str
    sent: float = 0.0
    received: float = 0.0


def time_limit(default: float) -> float:
    """Return the seconds that all hosts together have to answer: SHODH_HOST_SECONDS if it is set, else ``default``.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get(TIME_VARIABLE, "")
    with suppress(ValueError):
        if 0 < (seconds := float(text or default)) < float("inf"):
            return seconds
    raise UserError(f"{TIME_VARIABLE} is {text[:80]!r}: set it to a number of seconds, such as 60, or unset it")


def launcher_ssh_arguments() -> str:
    """Return PDSH_SSH_ARGS_APPEND for the launcher: our options, which override those that the user has set there."""
    return " ".join([*SSH_OPTIONS, os.environ.get("PDSH_SSH_ARGS_APPEND", "")]).strip()


def ssh_command(
    host: str, number: int = 0, options: Sequence[str] = SSH_OPTIONS, default: str = _PDSH_ARGUMENTS
) -> list[str]:
    """Return the ssh command that pdsh runs for a host, up to the command for the remote shell.

    Like pdsh, it takes the variables PDSH_SSH_ARGS_APPEND and PDSH_SSH_ARGS, splits them at blanks without regard to
    quotes, and replaces %h, %u and %n in them.

    Args:
        host: a name from a hostfile, with or without ``user@``.
        number: the host's number in the hostfile, from 0.
        options: options before those of the variables.
        default: value of PDSH_SSH_ARGS if it is not set.
    """
    user, _, name = host.rpartition("@")
    own = _own_name()
    text = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {os.environ.get('PDSH_SSH_ARGS', default)}"
    words = [word for word in text.split(" ") if word]

    def has(word: str, parameter: str) -> bool:
        return re.search(f"(?<!%){parameter}", word) is not None

    if user not in ("", own) and not any(has(word, "%u") for word in words):
        place = next((index for index, word in enumerate(words) if has(word, "%h")), len(words))
        words.insert(place, "-l%u")
    if not any(has(word, "%h") for word in words):
        words.append("%h")
    values = {"%h": name, "%u": user or own, "%n": str(number), "%%": "%"}
    return ["ssh", *options, *(re.sub("%[hun%]", lambda found: values[found[0]], word) for word in words)]


def shown_ssh(host: str) -> str:
    """Return the ssh command for a host as a user would type it."""
    return shlex.join(ssh_command(host, options=[], default="%h"))


def _own_name() -> str:
    with suppress(KeyError, OSError):  # a container may run as a user without a name
        return getpass.getuser()
    return ""


def run_on_hosts(
    hosts: list[str], script: Path, arguments: Sequence[list[str]] | None = None, seconds: float = 10.0
) -> list[Answer]:
    """Run a script on all hosts, with the interpreter at the same path as this one.

    Args:
        arguments: ``sys.argv[1:]`` of the script on each host.
        seconds: time limit for all hosts together.

    Raises:
        UserError: this host has no ssh.
    """
    if not shutil.which("ssh"):
        raise UserError("no ssh on this host's PATH: install an OpenSSH client")
    commands = [
        [*ssh_command(host, number), shlex.join([sys.executable, "-", *(arguments[number] if arguments else [])])]
        for number, host in enumerate(hosts)
    ]
    return run_processes(hosts, commands, script, seconds)


def run_processes(hosts: list[str], commands: list[list[str]], standard_input: Path, seconds: float) -> list[Answer]:
    """Run a command for each host, at most `AT_ONCE` at a time; kill those that are still running after ``seconds``.

    A long list of hosts shows its progress on stderr.
    """
    if not hosts:
        return []
    work = _Work(standard_input, seconds, time.monotonic() + seconds)
    with ThreadPoolExecutor(min(AT_ONCE, len(hosts))) as pool:
        asked = [pool.submit(work.run, host, command) for host, command in zip(hosts, commands, strict=True)]
        done = as_completed(asked)
        try:
            for _ in progress(done, "asking hosts", len(hosts)) if len(hosts) > AT_ONCE else done:
                pass
        except BaseException:
            work.stop()
            raise
    return [one.result() for one in asked]


@dataclass
class _Work:
    """State shared by the threads of one call."""

    standard_input: Path
    seconds: float
    deadline: float
    running: set[int] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)

    def stop(self) -> None:
        with self.lock:
            self.deadline = 0.0
            for group in self.running:
                _kill(group)

    def run(self, host: str, command: list[str]) -> Answer:
        if time.monotonic() >= self.deadline:  # of many hosts most end here, so before any file is opened
            return self._not_asked(host)
        # Pipes would keep us waiting for children of ssh, such as a ProxyCommand or a multiplexing master, that
        # outlive it. Files do not.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, open(self.standard_input) as given:
            with self.lock:
                if time.monotonic() >= self.deadline:
                    return self._not_asked(host)
                sent = time.time()
                # A session of its own, as under pdsh: ssh's children can be killed with it.
                process = subprocess.Popen(command, stdin=given, stdout=output, stderr=errors, start_new_session=True)
                self.running.add(process.pid)
            try:
                process.wait(max(self.deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                return Answer(host, "", f"no answer within {self.seconds:g} s", sent, time.time())
            finally:
                with self.lock:
                    self.running.discard(process.pid)
                    if process.returncode is None:
                        _kill(process.pid)
                process.wait()
            received = time.time()
            printed, error = (_text(file) for file in (output, errors))
        if process.returncode == 0:
            return Answer(host, printed, "", sent, received)
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        # The last line has the reason: of ssh's own failures (code 255), of a shell without the interpreter, and of
        # Python.
        reason = (lines[-1] if lines else f"exit code {process.returncode}")[:200]
        return Answer(host, printed, reason, sent, received)

    def _not_asked(self, host: str) -> Answer:
        return Answer(host, "", f"not asked: the {self.seconds:g} s for all hosts were over")


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode(errors="replace")


def group_failures(errors: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Group hosts whose errors differ only in the host's name and in numbers.

    Args:
        errors: by host.

    Returns:
        (error of the first host, hosts) of each group, in the order of the first hosts.
    """
    groups: dict[str, tuple[str, list[str]]] = {}
    for host, error in errors.items():
        kind = re.sub(r"\d+", "0", error.replace(host.rpartition("@")[2], "host"))
        groups.setdefault(kind, (error, []))[1].append(host)
    return list(groups.values())


def some(names: list[str]) -> str:
    """List the names, or the first few of many."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
