"""The process that inspects files before they are read: it may crash, hang or be forked, and the next file is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.data import opening

ABORT = "import os, sys; sys.stdin.readline(); os.abort()"
SLEEP = "import sys, time; sys.stdin.readline(); time.sleep(60)"
LOOP = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGXCPU)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1.0]
    return path


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (ABORT, "HDF5 crashes on it, exit code -6"),
        (SLEEP, "does not finish reading"),
        (LOOP, "does not finish reading"),
    ],
)
def test_a_file_that_crashes_or_hangs_the_process_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    opening._stop()
    with monkeypatch.context() as patch:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        patch.setattr(opening, "_start", lambda: subprocess.Popen([sys.executable, "-c", code], **pipes))
        patch.setattr(opening, "WALL_SECONDS", 0.3 if code == SLEEP else 30.0)
        with pytest.raises(UserError, match=message) as error:
            opening.inspected(path)
        assert str(path) in str(error.value)
    with opening.opened(path) as file:
        assert file["x"][0] == 1.0


def test_a_file_is_inspected_once_until_it_changes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspected_paths = []
    ask = opening._ask
    monkeypatch.setattr(opening, "_ask", lambda path: inspected_paths.append(path) or ask(path))
    for _ in range(3):
        with opening.opened(path):
            pass
    assert len(inspected_paths) == 1
    with h5py.File(path, "r+") as file:
        file["soft"] = h5py.SoftLink("/x")
    with pytest.raises(UserError, match="soft is a soft link to /x"), opening.opened(path):
        pass
    assert len(inspected_paths) == 2


def test_a_file_without_a_flow_opens_but_has_no_flow(path: Path) -> None:
    assert "no_flow" in opening.inspected(path)
    with pytest.raises(UserError, match="has no t1_fields/velocity"):
        opening.flow_of(path)


def test_a_forked_process_starts_its_own_inspector(path: Path, tmp_path: Path) -> None:
    """Data loaders fork workers: two processes that read one pipe would take each other's answers."""
    opening.inspected(path)
    assert opening._process is not None
    process_id = opening._process[1].pid
    other = tmp_path / "b.h5"
    other.write_bytes(path.read_bytes())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            opening.inspected(other)
            assert opening._process is not None
            code = int(opening._process[1].pid == process_id)
            opening._stop()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    opening.inspected(other)
    assert opening._process[1].pid == process_id
