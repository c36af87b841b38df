"""Open untrusted HDF5 files: a separate process inspects each file first."""

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
from shodh_moe.base.remote_file import RemoteFile, openable, size_of
from shodh_moe.base.text import printable_tree

CPU_SECONDS = 10  # a sound file takes milliseconds
WALL_SECONDS = 120.0  # generous: a slow file system does not mean a damaged file
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # (parent's process id, process): a fork needs its own
_sound: dict[tuple[object, ...], dict[str, Any]] = {}


def inspected(path: Path) -> dict[str, Any]:
    """Inspect a file and return the result of `shodh_moe.inspection.__main__.inspect`; the file is then safe to open.

    Each process inspects a file only once, and again if the file has changed.

    Raises:
        UserError: the file is missing, empty, truncated, locked, damaged, not HDF5, refers to other files, or has
            too many or too large objects.
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
    # In a remote file this also finds out whether it can be reached, before the inspection's limits apply.
    if not _has_signature(path):
        raise UserError(f"{path} is not an HDF5 file: remove it from the folder or convert it to the_well's format")
    found = printable_tree(_ask(path.absolute()))
    if "refused" in found:
        raise UserError(_sentence(path, found["refused"]))
    _sound[key] = found
    return found


def flow_of(path: Path) -> dict[str, Any]:
    """Describe a file's trajectories with `shodh_moe.inspection.flow.describe`.

    Raises:
        UserError: like `inspected`, and if the file has no flow trajectory in the_well's schema.
    """
    found = inspected(path)
    if "no_flow" in found:
        raise UserError(_sentence(path, found["no_flow"]))
    return found["flow"]


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, after inspection.

    Raises:
        UserError: like `inspected`, or HDF5 reports an error within the block.
    """
    inspected(path)
    source = openable(path)
    try:
        with h5py.File(source, "r") as file:
            yield file
    except BlockingIOError as error:
        raise UserError(f"{path} is locked: another process is writing it; wait until it has finished") from error
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(source, RemoteFile) and source.error:
            raise source.error from error
        raise UserError(_sentence(path, f"is damaged or unreadable ({' '.join(str(error).split())[:200]})")) from error
    finally:
        if isinstance(source, RemoteFile):
            source.close()


def _sentence(path: Path, what: str) -> str:
    """Complete the message ``what``, which begins with a verb or with the name of an object in the file.

    Adds the file's path, and a remedy if ``what`` has none.
    """
    joined = f"{path} {what}" if what.split()[0] in ("is", "has", "holds") else f"{path}: {what}"
    return joined if ": " in what or "; " in what else f"{joined}: copy or generate it again"


def _has_signature(path: Path) -> bool:
    """Look for the HDF5 signature at bytes 0, 512, 1024, 2048, ... as the library does."""
    try:
        source = openable(path)
        with source if isinstance(source, RemoteFile) else open(path, "rb") as file:
            at, size = 0, size_of(path)
            while at < size:
                file.seek(at)
                if file.read(len(_SIGNATURE)) == _SIGNATURE:
                    return True
                at = at * 2 or 512
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check permissions and the disk") from error
    return False


def _ask(path: Path) -> dict[str, Any]:
    """Ask the inspection process about a file; the file is refused if the process crashes or hangs."""
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
            # A late answer would be mistaken for the next file's.
            _stop()
            raise
        if answer:
            return json.loads(answer)
        code = _stop(patience=0.0 if answer is None else 1.0)
    if code == -signal.SIGXCPU or answer is None:
        return {"refused": "is damaged (HDF5 does not finish reading it)"}
    return {"refused": f"is damaged (HDF5 crashes on it, exit code {code})"}


def _line(process: subprocess.Popen[bytes]) -> bytes | None:
    """Read one line of the process's stdout; b"" if it ended, None if it takes too long."""
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
    """Start the inspection process with this package on its path."""
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
    """End the inspection process and return its exit code; None if there is none.

    If this process is killed, the inspection process ends by itself.
    """
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
