"""Starts a script on several ranks of this machine with DeepSpeed's own launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def launch(ranks: int, script: Path, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_gpus RANKS script arguments`` on CPU; the caller looks at the result."""
    with start(ranks, script, *arguments) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def start(ranks: int, script: Path, *arguments: str) -> subprocess.Popen[str]:
    """As `launch`, without waiting; in a session of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(port), str(script), *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
