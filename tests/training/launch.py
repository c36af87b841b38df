"""Start a script on several ranks of this machine."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from shodh_moe.base.network import free_port
from tests.forked import ENVIRONMENT, context


def launch(ranks: int, script: Path, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a script on every rank until all end; the first nonzero exit code ends the others and is returned.

    This is what launchers do, in a fraction of the time: the ranks need not import torch and DeepSpeed (see
    tests/forked.py), which DeepSpeed's launcher itself imports twice more before they start.
    """
    environment = {**os.environ, **ENVIRONMENT, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [str(script), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        processes = []
        for rank in range(ranks):
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context().Process(target=_rank, args=(command, variables, outputs)))
            processes[-1].start()
        try:
            code = _wait(processes, command, timeout)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


def _rank(command: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """Run ``command`` in this process as ``python -u`` would."""
    os.setsid()
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _wait(processes: list[ForkServerProcess], command: list[str], timeout: float) -> int:
    """Wait for all ranks; after one fails, give the others the time that a launcher gives them."""
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


def start(ranks: int, script: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``deepspeed --num_gpus RANKS script arguments`` in its own session; the caller waits for it."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(script), *arguments]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
