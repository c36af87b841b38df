"""A terminal that closes while training runs, with real terminals and processes."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shodh_moe.base.errors import EXIT_REQUEUE
from shodh_moe.checkpoint import list_checkpoints
from tests import forked
from tests.training.synthetic import write_job

pytestmark = pytest.mark.distributed

ENDLESS = ["training.steps=1000000", "training.checkpoint_every=1000000", "training.validate_every=1000000"]
SHORT = ["training.steps=60", "training.checkpoint_every=60"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("hangup"), log_every=1, validate_every=1000)


class Terminal:
    """A pseudo-terminal whose output is read by nobody, as on a screen."""

    def __init__(self, folder: Path):
        self.master, self._slave = pty.openpty()
        self._folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command as the leader of this terminal's session, like the shell of an ssh session."""
        process = subprocess.Popen(
            command,
            cwd=self._folder,
            env={**os.environ, **forked.ENVIRONMENT},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(self._slave)
        self.started.append(process)
        return process

    def close(self) -> None:
        os.close(self.master)
        self.master = -1


@pytest.fixture
def terminal(case: Path) -> Iterator[Terminal]:
    terminal = Terminal(case)
    yield terminal
    if terminal.master >= 0:
        terminal.close()
    for process in terminal.started:
        process.kill()
        process.wait()
    for process in _processes(case):
        process.kill()


def _pretrain(name: str, *settings: str) -> list[str]:
    return [sys.executable, "-m", "shodh_moe.cli", "pretrain", "--config", "config.yaml", "--name", name, *settings]


def _processes(folder: Path) -> list[psutil.Process]:
    """Return the processes of a training in ``folder``: command, launcher, ranks, sentinel."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and any("shodh_moe" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def test_closing_the_terminal_of_the_command_stops_it_with_a_checkpoint(case: Path, terminal: Terminal) -> None:
    process = terminal.start(*_pretrain("closed", *ENDLESS))
    _until(lambda: _steps(case / "runs/closed"))
    terminal.close()
    assert process.wait(60) == EXIT_REQUEUE
    assert _processes(case) == []
    assert list_checkpoints(case / "runs/closed/checkpoints"), "the ranks printed to the closed terminal"


def test_closing_the_terminal_of_a_shell_stops_its_job_with_a_checkpoint(case: Path, terminal: Terminal) -> None:
    """The shell and the kernel each send SIGHUP; a second one must not end the ranks at once."""
    terminal.start("bash", "--norc", "-i")
    line = " ".join(f"'{word}'" for word in _pretrain("shell", *ENDLESS)) + "; touch later-stage\n"
    os.write(terminal.master, line.encode())
    _until(lambda: _steps(case / "runs/shell"))
    terminal.close()
    _until(lambda: not _processes(case))
    assert list_checkpoints(case / "runs/shell/checkpoints")
    assert not (case / "later-stage").exists()


def test_a_job_that_does_not_belong_to_the_shell_any_more_goes_on_without_its_terminal(
    case: Path, terminal: Terminal
) -> None:
    """After ``disown`` nothing sends SIGHUP, and the ranks write to a terminal that is gone."""
    terminal.start("bash", "--norc", "-i")
    words = " ".join(f"'{word}'" for word in _pretrain("disowned", *SHORT))
    os.write(terminal.master, f"({words}; echo $? >code) & disown\n".encode())
    _until(lambda: _steps(case / "runs/disowned"))
    terminal.close()
    _until((case / "code").exists)
    _until(lambda: (case / "code").read_text())
    assert (case / "code").read_text() == "0\n"
    assert list(list_checkpoints(case / "runs/disowned/checkpoints")) == [60]


def test_nohup_keeps_the_run_going(case: Path) -> None:
    command = ["nohup", *_pretrain("nohup", *SHORT)]
    process = subprocess.Popen(
        command, cwd=case, env={**os.environ, **forked.ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        _until(lambda: _steps(case / "runs/nohup"))
        for member in _processes(case):
            member.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, out
    assert list(list_checkpoints(case / "runs/nohup/checkpoints")) == [60]
