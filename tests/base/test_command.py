"""Exit codes of commands. test_bad_input.py tests what each command refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

RANK = """
import atexit, os
from shodh_moe.base.command import end_rank, exit_code
from shodh_moe.base.errors import UserError

atexit.register(os.abort)  # as the threads of a process group may

def work():
    print("said before the end")
    {last}

end_rank(lambda: exit_code(work))
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("pass", 0), ("raise UserError('wrong')", 2), ("raise SystemExit(75)", 75), ("raise SystemExit('text')", 1)],
)
def test_a_rank_keeps_its_exit_code_even_if_interpreter_shutdown_fails(last: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", RANK.format(last=last)], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == "said before the end\n"
