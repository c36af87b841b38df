"""A disk that fills up while a run writes its log: a real in-memory file system of a few MB."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh_moe.base.errors import EXIT_USER_ERROR, UserError
from shodh_moe.checkpoint import CheckpointReader, damage, list_checkpoints
from shodh_moe.training.log import Log
from tests.training.launch import start
from tests.training.synthetic import write_case

WORKER = Path(__file__).with_name("worker_pretrain.py")
STEPS, SAVED = 50, 20
SETTINGS = (
    f"training.steps={STEPS}",
    f"training.checkpoint_every={SAVED}",
    "training.validate_every=1000",
    "training.log_every=1",
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(mount_point)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system of a few MB, so logging to a full disk is not tested")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk with a file."""
    path, size = disk / "filler", 1 << 20
    with open(path, "ab", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return path


def write_steps(log: Log) -> Iterator[int]:
    """Yield the number of each step after it is logged."""
    for step in range(1, 1000):
        log.write({"kind": "train", "step": step, "loss": 1.0, "words": "x" * 300})
        yield step


def test_a_full_disk_leaves_no_partial_record_in_either_log(small_disk: Path) -> None:
    log = Log(small_disk, 0)
    filler = fill(small_disk)
    logged: list[int] = []
    with pytest.raises(UserError, match="no space left on the disk") as raised:
        logged.extend(write_steps(log))
    steps = len(logged)
    assert f"cannot write {small_disk}/" in str(raised.value)
    lines = (small_disk / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines][:steps] == list(range(1, steps + 1))
    assert all(line.endswith("\n") for line in lines)
    # A start on the full disk changes nothing; a start with free space continues.
    with pytest.raises(UserError, match="no space left on the disk"):
        Log(small_disk, steps)
    assert (small_disk / "metrics.jsonl").read_text() == "".join(lines)
    filler.unlink()
    log = Log(small_disk, steps)
    log.write({"kind": "train", "step": steps + 1, "loss": 2.0})
    log.close()
    events = EventAccumulator(str(small_disk / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, steps + 2))
    assert events.Scalars("train/loss")[-1].value == 2


@contextmanager
def started(folder: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(2, WORKER, str(folder), str(run), "auto", *SETTINGS)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_run_that_cannot_log_keeps_its_checkpoint_and_resumes_after_space_is_freed(
    small_disk: Path, tmp_path: Path
) -> None:
    folder = write_case(tmp_path / "case")
    run, unbroken = small_disk / "run", tmp_path / "unbroken"
    with started(folder, run) as process:
        deadline = time.monotonic() + 90
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        filler = fill(small_disk)
        out, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_USER_ERROR, out + error
    assert "Traceback" not in error, error
    (message,) = [line for line in error.splitlines() if line.startswith("error")]
    assert message.startswith((f"error: cannot write {run}/metrics.jsonl: ", f"error: cannot write {run}/tensorboard/"))
    assert "no space left on the disk" in message
    (saved,) = list_checkpoints(run / "checkpoints")
    assert saved == SAVED
    assert damage(run / "checkpoints" / str(saved)) is None
    filler.unlink()
    with started(folder, run) as resumed, started(folder, unbroken) as undisturbed:
        for process in (undisturbed, resumed):
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, out + error
    assert f"from step {SAVED} of" in out
    a, b = (CheckpointReader(place / "checkpoints" / str(STEPS)) for place in (run, unbroken))
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in b.names())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step < STEPS] == list(range(1, STEPS))
