"""The effect of a signal on concurrent jobs. tests/ccm/bench/test_run.py has the other tests of jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shodh_moe.base.errors import EXIT_REQUEUE

PARENT = """
import sys
from pathlib import Path
from shodh_moe.launching.jobs import ProcessJob, run_jobs
folder = Path(sys.argv[1])
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
run_jobs([ProcessJob(n, ["-c", child, str(folder / n)], folder / f"{n}.log", folder / f"{n}.json") for n in "abc"], 2)
"""


@pytest.mark.distributed
def test_a_signal_ends_running_jobs_and_starts_no_others(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + 50
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.send_signal(signal.SIGTERM)
        output, _ = parent.communicate(timeout=20)
    assert parent.returncode == EXIT_REQUEUE
    assert "stopped by a signal: the same command resumes" in output
    for name in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
    assert not (tmp_path / "c").exists()
