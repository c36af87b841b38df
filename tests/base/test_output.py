"""Output whose reader is gone, in real processes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

MUCH = "for n in range(100_000): print('line', n)"


def _run(code: str, tail: str = "| head -1") -> subprocess.CompletedProcess[str]:
    """Run Python code in a pipe; the output ends with the exit code of each member of the pipe."""
    command = f"'{sys.executable}' -c \"$CODE\" {tail}; echo ${{PIPESTATUS[@]}}"
    code = "import sys\nfrom shodh_moe.base.command import exit_code\n" + code
    environment = {**os.environ, "CODE": code}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "work",
    [
        MUCH,
        f"{MUCH.replace('n)', 'n, flush=True)')}",
        "print('x\\n' * 100_000)",
        "print('x\\n' * 2000)\n import time; time.sleep(0.5)\n print('late')",  # fails when it is flushed at the end
    ],
)
def test_a_command_whose_reader_ends_stops_quietly(work: str) -> None:
    done = _run(f"def work():\n {work}\n print('done', file=sys.stderr)\nsys.exit(exit_code(work))")
    assert done.stdout.splitlines()[1:] == ["141 0"]
    assert done.stderr in ("", "done\n")


def test_a_rank_whose_reader_ends_goes_on() -> None:
    code = f"def work():\n {MUCH}\n print('done', file=sys.stderr)\nsys.exit(exit_code(work, goes_on=True))"
    done = _run(code)
    assert (done.stdout, done.stderr) == ("line 0\n0 0\n", "done\n")


def test_the_message_of_an_error_may_go_unread() -> None:
    code = "from shodh_moe.base.errors import UserError\nimport time\n"
    code += "def work():\n time.sleep(0.5)\n raise UserError('no' * 100_000)\nsys.exit(exit_code(work))"
    assert _run(code, "2>&1 | true").stdout == "2 0\n"


def test_other_errors_of_pipes_are_not_taken_for_it() -> None:
    code = "def work():\n raise BrokenPipeError(32, 'another pipe')\nsys.exit(exit_code(work))"
    done = _run(code, "| cat")
    assert done.stdout == "1 0\n"
    assert "another pipe" in done.stderr


@pytest.mark.parametrize("work", [MUCH, "print('little')"])
def test_a_full_disk_is_reported_in_one_line(work: str) -> None:
    done = _run(f"def work():\n {work}\nsys.exit(exit_code(work))", ">/dev/full")
    assert done.stdout == "2\n"
    assert done.stderr == (
        "error: cannot use a file: no space left on the disk; free some and run the same command again\n"
    )


def test_a_closed_descriptor_is_a_stream_without_a_reader() -> None:
    done = _run("def work():\n print('x')\nsys.exit(exit_code(work))", ">&-")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_output_to_a_closed_terminal_is_discarded(tmp_path: Path) -> None:
    """Whether a command should end with its terminal is what SIGHUP says."""
    master, slave = pty.openpty()
    code = "import sys, time\nfrom shodh_moe.base.command import exit_code\n"
    code += "def work():\n print('first', flush=True)\n sys.stdin.readline()\n print('second', flush=True)\n"
    code += " print('third', file=sys.stderr)\n open(sys.argv[1], 'w').write('done')\nsys.exit(exit_code(work))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "end")], stdin=subprocess.PIPE, stdout=slave, stderr=slave
    )
    os.close(slave)
    assert os.read(master, 100).startswith(b"first")
    os.close(master)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "end").read_text() == "done"
