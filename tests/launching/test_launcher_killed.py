"""Ranks whose launcher is killed with ``kill -9`` write a checkpoint and end, whichever process of it that was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shodh_moe.checkpoint import find_checkpoint
from tests.training.synthetic import write_job

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[2] / "launch/pretrain.py"
STARTS = {
    "shodh": ["-m", "shodh_moe.cli", "pretrain"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)],
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without end."""
    never = 1_000_000
    return write_job(tmp_path_factory.mktemp("killed"), steps=never, checkpoint_every=never, validate_every=never)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("start", "killed"), [("shodh", "outermost"), ("shodh", "launcher"), ("shodh", "both"), ("torchrun", "launcher")]
)
def test_ranks_notice_that_their_launcher_was_killed(case: Path, start: str, killed: str) -> None:
    name = f"{start}-{killed}"
    command = [sys.executable, *STARTS[start], "--config", "config.yaml", "--name", name]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    outermost = psutil.Popen(command, cwd=case, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        metrics = case / "runs" / name / "metrics.jsonl"
        _wait(lambda: metrics.exists() and metrics.stat().st_size > 0, 90, "no training")
        started = outermost.children(recursive=True)
        ranks = [process for process in started if process.environ().get("LOCAL_RANK") in ("0", "1")]
        launcher = next(rank for rank in ranks if "sentinel" not in " ".join(rank.cmdline())).parent()
        assert launcher is not None
        assert len(_alive(ranks)) >= 2
        for process in {"outermost": [outermost], "launcher": [launcher], "both": [launcher, outermost]}[killed]:
            process.send_signal(signal.SIGKILL)
        _wait(lambda: not _alive([*started, outermost]), 40, f"still alive: {_alive(started)}")
        if killed == "launcher":
            assert outermost.wait(1) not in (0, 75)
    finally:
        for process in [outermost, *_alive(started)]:
            with suppress(psutil.Error):
                process.kill()
        outermost.wait()
    found = find_checkpoint(case / "runs" / name / "checkpoints")
    assert found is not None, "the ranks end with a checkpoint"
    assert found[1]["step"] > 0
    assert not list((case / "runs" / name).glob(".stop-*"))
