"""Open HDF5 files that someone else made: each is looked through by another process first."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

from shodh_moe.base.errors import UserError

CPU_SECONDS = 10  # a sound file takes milliseconds
WALL_SECONDS = 120.0  # a slow file system is no damage
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # and whose child it is: a fork needs its own
_sound: dict[tuple[object, ...], dict[str, Any]] = {}


def inspected(path: Path) -> dict[str, Any]:
    """What the inspection found in a file that is safe to open: see `shodh_moe.inspection.__main__.inspect`.

    A file is inspected once in a process, and again when it has changed.

    Raises:
        UserError: the file is missing, empty, truncated, locked, damaged, not HDF5, leads to other files, or has
            objects of absurd number or size.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path or generate the data again")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of one HDF5 file")
    status = path.stat()
    key = (path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key in _sound:
        return _sound[key]
    if status.st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or generate it again")
    if not _has_signature(path, status.st_size):
        raise UserError(f"{path} is not an HDF5 file: remove it from the folder or convert it to the_well's format")
    found = _ask(path.absolute())
    if "refused" in found:
        raise UserError(_sentence(path, found["refused"]))
    _sound[key] = found
    return found


def flow_of(path: Path) -> dict[str, Any]:
    """The description of a file's trajectories, `shodh_moe.inspection.flow.describe`.

    Raises:
        UserError: as `inspected`, and for a file that holds no flow trajectory in the_well's schema.
    """
    found = inspected(path)
    if "no_flow" in found:
        raise UserError(_sentence(path, found["no_flow"]))
    return found["flow"]


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading.

    Raises:
        UserError: as `inspected`; and what HDF5 reports in the block.
    """
    inspected(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except BlockingIOError as error:
        raise UserError(f"{path} is locked: another process writes it; wait until that has ended") from error
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(_sentence(path, f"is damaged or unreadable ({' '.join(str(error).split())[:200]})")) from error


def _sentence(path: Path, what: str) -> str:
    """``what`` begins with a verb, or with the object in the file that it is about."""
    joined = f"{path} {what}" if what.split()[0] in ("is", "has", "holds") else f"{path}: {what}"
    return joined if ": " in what or "; " in what else f"{joined}: copy or generate it again"


def _has_signature(path: Path, size: int) -> bool:
    """HDF5 looks for it at 0, 512, 1024, 2048, ..."""
    try:
        with open(path, "rb") as file:
            at = 0
            while at < size:
                file.seek(at)
                if file.read(len(_SIGNATURE)) == _SIGNATURE:
                    return True
                at = at * 2 or 512
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check permissions and the disk") from error
    return False


def _ask(path: Path) -> dict[str, Any]:
    """The other process's answer about a file, or what became of it meanwhile."""
    global _process
    with _lock:
        if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
            _process = os.getpid(), _start()
        process = _process[1]
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"path": str(path)}).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process)
        except BaseException:
            # Its answer would be taken for that of the next file.
            _stop()
            raise
        if answer:
            return json.loads(answer)
        code = _stop(patience=0.0 if answer is None else 1.0)
    if code == -signal.SIGXCPU or answer is None:
        return {"refused": "is damaged (HDF5 does not come to an end with it)"}
    return {"refused": f"is damaged (HDF5 crashes on it, exit code {code})"}


def _line(process: subprocess.Popen[bytes]) -> bytes | None:
    """A line of its stdout; b"" if it ended, None if it takes too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        text = b""
        while not text.endswith(b"\n"):
            if not selector.select(WALL_SECONDS):
                return None
            piece = os.read(process.stdout.fileno(), 2**16)
            if not piece:
                return b""
            text += piece
    return text


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "shodh_moe.inspection", str(CPU_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@atexit.register
def _stop(patience: float = 1.0) -> int | None:
    """End the other process; returns its exit code. It ends by itself where this one is killed."""
    global _process
    if _process is None or _process[0] != os.getpid():
        return None
    process, _process = _process[1], None
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    return process.returncode
