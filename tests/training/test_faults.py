"""Faults on clusters, with real ranks under the DeepSpeed launcher: signals, hangs, a second start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from shodh_moe.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.training.lock import lock_run
from tests.training.launch import launch, start
from tests.training.synthetic import write_case
from tests.training.weights import check_same_weights

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("worker_pretrain.py")
KILLS = int(os.environ.get("SHODH_KILLS", "3"))
STEPS = 80 + 25 * max(KILLS - 3, 0)  # enough steps that training does not finish before the last kill
LONG = (
    f"training.steps={STEPS}",
    "training.checkpoint_every=1000",
    "training.validate_every=1000",
    "training.log_every=5",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def unbroken(folder) -> Path:
    run = folder / "unbroken"
    done = launch(2, WORKER, str(folder), str(run), "auto", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def _records(run: Path) -> list[dict]:
    """Read the run's records without their timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for key in ("step_ms", "tokens_per_second", "peak_memory_bytes"):
            record.pop(key, None)
        for layer in record.get("routing", []):
            del layer["all_to_all"]
    return records


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _once_training(process: subprocess.Popen[str], run: Path, before: str = "") -> list[psutil.Process]:
    """Return the ranks in order, as soon as the log differs from ``before``."""
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text() == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # the process has just ended
            for argument in child.cmdline():
                if argument.startswith("--local_rank="):
                    found[int(argument.partition("=")[2])] = child
    return [found[rank] for rank in sorted(found)]


def _end(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_rank_makes_all_save_a_checkpoint_and_stop(folder, unbroken, number):
    run = folder / number.name
    process = start(2, WORKER, str(folder), str(run), "auto", *LONG)
    _once_training(process, run)[1].send_signal(number)
    out, error = _end(process, 40)
    assert process.returncode == EXIT_REQUEUE, out + error
    (step,) = list_checkpoints(run / "checkpoints")
    assert 0 < step < STEPS
    assert f"stopped by a signal after step {step}" in out
    done = launch(2, WORKER, str(folder), str(run), "auto", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from step {step}" in done.stdout
    check_same_weights(run, unbroken, STEPS)
    assert _records(run) == _records(unbroken), "also of the interval that the stop fell into"


@pytest.mark.timeout(900)
def test_ranks_killed_at_random_steps_lose_nothing(folder, unbroken):
    """Each kill must end the whole job with an error within 30 s. SHODH_KILLS=20 makes twenty kills."""
    run, random = folder / "killed", np.random.default_rng(0)
    settings = (*LONG, "training.checkpoint_every=3")
    for _ in range(KILLS):
        process = start(2, WORKER, str(folder), str(run), "auto", *settings)
        before = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        ranks = _once_training(process, run, before)
        time.sleep(random.uniform(0, 0.4))
        ranks[random.integers(2)].kill()
        started = time.monotonic()
        out, error = _end(process, 60)
        assert time.monotonic() - started < 30
        assert process.returncode != 0, out + error
        assert not any(_alive(rank) for rank in ranks)
    done = launch(2, WORKER, str(folder), str(run), "auto", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    check_same_weights(run, unbroken, STEPS)


def test_a_stopped_rank_ends_the_job_and_keeps_stacks_but_a_suspended_job_continues(folder):
    run = folder / "hung"
    process = start(
        2, WORKER, str(folder), str(run), "auto", *LONG, "training.steps=100000", "training.stall_seconds=4"
    )
    ranks = _once_training(process, run)
    # A job that was suspended as a whole continues when it is woken, no matter how late.
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(7)
    _once_training(process, run, (run / "metrics.jsonl").read_text())
    ranks[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    out, error = _end(process, 60)
    assert time.monotonic() - started < 4 + 30
    assert process.returncode not in (0, EXIT_USER_ERROR, EXIT_REQUEUE), out + error
    assert "no progress for 4 s" in error
    assert not any(_alive(rank) for rank in ranks)
    for rank in (0, 1):
        stack = (run / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert "most recent call first" in stack
        assert "pretrain.py" in stack


def test_a_second_start_in_the_same_run_folder_is_refused(folder):
    run = folder / "twice"
    lock = lock_run(run)
    (run / ".stop-first").write_text("stop")  # its ranks have not read it yet
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr
    assert f"run folder {run} is being trained by another process" in done.stderr
    assert f'"process": {os.getpid()}' in done.stderr
    assert done.stderr.count("error") == 1
    assert (run / ".stop-first").exists()
    lock.close()
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (run / ".stop-first").exists(), "else it would stay forever"


def test_the_lock_names_its_holder_and_is_released_when_it_closes(tmp_path):
    with lock_run(tmp_path) as lock:
        with pytest.raises(UserError, match=rf'"process": {os.getpid()}'):
            lock_run(tmp_path)
        assert json.loads((tmp_path / ".lock").read_text()).keys() == {"host", "process", "since"}
        assert not lock.closed
    lock_run(tmp_path).close()
