"""Processes that start fast: each is forked from a server that has already imported torch and DeepSpeed.

Importing them takes longer than most of what the tests' ranks do. The server is started on first use, once per pytest
process, and runs nothing but imports. Like ranks on a CPU, it uses one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch.multiprocessing

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
IMPORTS = ["torch.distributed", "deepspeed", "shodh_moe.runs.pretrain_rank", "shodh_moe.training.pretrain"]
IMPORTS += ["shodh_moe.training.tokenizer_task", "shodh_moe.parallel.rendezvous", "safetensors.torch", "pytest"]


def context() -> ForkServerContext:
    """Return a multiprocessing context that forks its processes from the server."""
    with mock.patch.dict(os.environ, ENVIRONMENT):  # DeepSpeed reads it when it is imported
        found = multiprocessing.get_context("forkserver")
        found.set_forkserver_preload(IMPORTS)
        forkserver.ensure_running()
    return found


def spawn(worker: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Run ``worker(rank, *arguments)`` on every rank; raise the error of a rank that fails."""
    context()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=ranks, start_method="forkserver")


def run(
    script: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run ``python -u script arguments`` in ``folder``, once with each of ``environments``, all at the same time.

    The first process that fails ends the others, as launchers do it, and its exit code is returned. The output is that
    of all of them. Raises subprocess.TimeoutExpired after ``timeout`` seconds.
    """
    command = [str(script), *arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        processes = [
            context().Process(target=_become, args=(command, {**variables, **ENVIRONMENT}, folder, outputs))
            for variables in environments
        ]
        try:
            for process in processes:
                process.start()
            code = _wait(processes, command, timeout)
        finally:
            for process in filter(lambda process: process.pid, processes):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


def _become(command: list[str], environment: dict[str, str], folder: Path, outputs: list[Path]) -> None:
    """Turn this process into the one that ``python -u command`` would be, in a session of its own."""
    os.setsid()
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _wait(processes: list[ForkServerProcess], command: list[str], timeout: float) -> int:
    """Wait for all; once one has failed, for as long as a launcher waits for the others."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(command, timeout)
        if failed := [process.exitcode for process in processes if process.exitcode]:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(30)
            return failed[0]
        time.sleep(0.02)
    return next((process.exitcode for process in processes if process.exitcode), 0)
