"""Run a library that may crash or hang on a damaged file in a process of its own, which outlives the call."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError

SECONDS = 120.0  # a sound file takes a few seconds
SECONDS_PER_BYTE = 1e-6  # more for large files on slow disks

_worker: tuple[multiprocessing.process.BaseProcess, Connection] | None = None


def run_apart(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(path, *arguments)``, run in the worker process; all of these have to be picklable.

    Raises:
        UserError: the process crashes or takes too long; it is replaced before the next call.
        Exception: whatever the function raises.
    """
    global _worker
    if _worker is None or not _worker[0].is_alive():
        _worker = _start()
    _, connection = _worker
    size = (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )
    try:
        # The process keeps the working folder in which it was started.
        connection.send((function, path.absolute(), arguments))
        if not connection.poll(SECONDS + SECONDS_PER_BYTE * size):
            raise UserError(f"{path} is damaged (VTK does not finish reading it): copy it again")
        raised, result = connection.recv()
    except (EOFError, ConnectionError) as error:
        stop()
        raise UserError(f"{path} is damaged (VTK crashes on it): copy it again") from error
    except BaseException:
        stop()  # a late answer would be mistaken for that of the next call
        raise
    if isinstance(result, UserError):
        raise UserError(str(result).replace(str(path.absolute()), str(path)))
    if raised:
        raise result
    return result


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    here.recv()  # it has started; on a busy machine this takes longer than a call
    return process, here


def stop() -> None:
    """End the worker process, if there is one."""
    global _worker
    if _worker is not None:
        process, connection = _worker
        _worker = None
        connection.close()
        process.kill()
        process.join()


def _serve(connection: Connection) -> None:
    """Answer calls until the other side is closed."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libraries print there what they also report
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
