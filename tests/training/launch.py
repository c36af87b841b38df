"""Start a script on several ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shodh_moe.base.network import free_port
from tests import forked


def launch(ranks: int, script: Path, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a script on every rank until all end; the first nonzero exit code ends the others and is returned.

    This is what launchers do, in a fraction of the time: DeepSpeed's imports itself twice before its ranks do.
    """
    common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return forked.run(script, arguments, environments, Path.cwd(), timeout)


def start(ranks: int, script: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``deepspeed --num_gpus RANKS script arguments`` in its own session; the caller waits for it."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(script), *arguments]
    environment = {**os.environ, **forked.ENVIRONMENT}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
