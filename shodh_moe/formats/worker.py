"""Run functions that may crash or hang on a damaged file in a process of their own, which outlives the call."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError

SECONDS = 120.0  # a sound file takes a few seconds
SECONDS_PER_BYTE = 1e-6  # more for large files on slow disks

# With the id of the process that started it: a fork needs a worker of its own.
_worker: tuple[int, subprocess.Popen[bytes], Connection] | None = None


def run_apart(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(path, *arguments)``, run in the worker process; all of these have to be picklable.

    Raises:
        UserError: the process crashes or takes too long; it is replaced before the next call.
        Exception: whatever the function raises.
    """
    global _worker
    if not is_running():
        _worker = _start()
    assert _worker is not None
    connection = _worker[2]
    try:
        # The process keeps the working folder in which it was started.
        connection.send((function, path.absolute(), arguments))
        if not connection.poll(SECONDS + SECONDS_PER_BYTE * _size(path)):
            raise UserError(f"{path} is damaged (its library does not finish reading it): copy it again")
        raised, result = connection.recv()
    except (EOFError, ConnectionError) as error:
        stop()
        raise UserError(f"{path} is damaged (its library crashes on it): copy it again") from error
    except BaseException:
        stop()  # a late answer would be mistaken for that of the next call
        raise
    if isinstance(result, UserError):
        raise UserError(str(result).replace(str(path.absolute()), str(path)))
    if raised:
        raise result
    return result


def is_running() -> bool:
    """Whether this process has a worker."""
    return _worker is not None and _worker[0] == os.getpid() and _worker[1].poll() is None


@lru_cache(maxsize=256)
def _size(path: Path) -> int:
    """Size of a file, or of all files in a folder, in bytes."""
    with suppress(OSError):
        return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")))
    return 0


def _start() -> tuple[int, subprocess.Popen[bytes], Connection]:
    here, there = Pipe()
    # Some libraries return without an error and leave a part of an array unset. With this variable glibc fills new
    # memory with the byte 0x7f, so that unset floats are 3e38 or 1e306, which nobody takes for values.
    unset = {"MALLOC_PERTURB_": str(0x7F ^ 0xFF)}
    python_path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), *sys.path]))
    process = subprocess.Popen(
        [sys.executable, "-m", "shodh_moe.formats", str(there.fileno())],
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # libraries print there what they also report
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **unset},
    )
    there.close()
    here.recv()  # it has started; on a busy machine this takes longer than a call
    return os.getpid(), process, here


def stop() -> None:
    """End the worker process, if there is one."""
    global _worker
    if _worker is not None and _worker[0] == os.getpid():
        _, process, connection = _worker
        connection.close()
        process.kill()
        process.wait()
    _worker = None


def serve(descriptor: int) -> None:
    """Answer the calls that arrive at a file descriptor until the other side is closed."""
    connection = Connection(descriptor)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("started")
    while True:
        try:
            function, path, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = False, function(path, *arguments)
        except Exception as error:
            answer = True, error if isinstance(error, UserError) else ValueError(str(error) or type(error).__name__)
        connection.send(answer)
