"""Several ranks write checkpoints in the background: each is complete or absent after any failure or kill."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.base.errors import ReportedByRank0, UserError
from shodh_moe.checkpoint import CheckpointReader, CheckpointWriter, Fragment, damage, find_checkpoint, list_checkpoints
from shodh_moe.checkpoint import rank_file as rank_file_module
from shodh_moe.checkpoint import write as write_module
from tests.checkpoint.ranks import TENSORS, Ranks, rank_share, shapes_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "PATIENCE_S", 20.0)
    monkeypatch.setattr(write_module, "GRACE_S", 0.05)


def test_a_checkpoint_has_one_file_per_rank_and_latest_points_at_it(tmp_path: Path) -> None:
    Ranks(tmp_path, world_size=3).saved(7, config={"name": "tiny"}, sampler={"position": 21})
    assert sorted(os.listdir(tmp_path)) == ["7", "latest"]
    files = [f"rank_0000{rank}.safetensors" for rank in range(3)]
    assert sorted(os.listdir(tmp_path / "7")) == [*files, "state.json"]
    assert (tmp_path / "latest").read_text() == "7\n"
    state = CheckpointReader(tmp_path / "7").state
    assert (state["step"], state["world_size"], state["sampler"]) == (7, 3, {"position": 21})


class BlockedWrites:
    """Blocks every write of a rank's file until ``go`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go = threading.Event()
        write = rank_file_module.HostCopy.write

        def wait_and_write(host: Any, path: Path) -> dict[str, Any]:
            assert self.go.wait(20)
            return write(host, path)

        monkeypatch.setattr(rank_file_module.HostCopy, "write", wait_and_write)


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, ranks = BlockedWrites(monkeypatch), Ranks(tmp_path)
    live = {name: tensor.clone() for name, tensor in TENSORS.items()}
    facts = {"losses": [1.0]}
    ranks.save(1, live, facts=facts)
    for tensor in live.values():
        tensor.fill_(-1)
    facts["losses"].append(2.0)
    for writer in ranks.writers:
        writer.check()  # neither waits nor raises
    assert list_checkpoints(tmp_path) == []
    blocked.go.set()
    assert ranks.errors() == [None, None]
    reader = CheckpointReader(tmp_path / "1")
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.tensor(name), tensor)
    assert reader.state["facts"] == {"losses": [1.0]}


def test_a_save_waits_for_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, ranks = BlockedWrites(monkeypatch), Ranks(tmp_path)
    ranks.save(1)
    threading.Timer(0.2, blocked.go.set).start()
    ranks.save(2, {name: tensor + 1 for name, tensor in TENSORS.items()})
    assert 1 in list_checkpoints(tmp_path)
    assert ranks.errors() == [None, None]
    for step in (1, 2):
        stored = CheckpointReader(tmp_path / str(step)).tensor("model/a.weight")
        assert torch.equal(stored, TENSORS["model/a.weight"] + step - 1)


def test_the_newest_and_every_tenth_are_kept(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, keep_last=2, every=10)
    for step in (5, 10, 15, 20, 25, 30, 35):
        ranks.saved(step)
    assert list_checkpoints(tmp_path) == [10, 20, 30, 35]
    assert sorted(os.listdir(tmp_path)) == ["10", "20", "30", "35", "latest"]
    assert [damage(tmp_path / str(step)) for step in (10, 20, 30, 35)] == [None] * 4


def test_later_steps_of_an_abandoned_history_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run resumed from step 2, so `find_checkpoint` and ``keep_last`` must not take step 4 for its newest."""
    for attempt in ("first", "second"):
        for step in (2, 4):
            Ranks(tmp_path, attempt=f"{attempt}{step}").saved(step)
        Ranks(tmp_path, keep_last=1, attempt=f"{attempt}again").saved(3)
        assert list_checkpoints(tmp_path) == [3]
        found = find_checkpoint(tmp_path)
        assert found is not None
        assert found[0].name == "3"
        assert f"checkpoint {tmp_path / '4'} is now abandoned-4" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["3", "abandoned-3", "abandoned-4", "latest"]
    assert damage(tmp_path / "abandoned-4") is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path).saved(1)
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    ranks.saved(1, other)
    assert torch.equal(CheckpointReader(tmp_path / "1").tensor("model/a.weight"), other["model/a.weight"])
    assert sorted(os.listdir(tmp_path)) == ["1", "latest"]


# Failures.


def no_space_for(monkeypatch: pytest.MonkeyPatch, *ranks: int) -> None:
    """Write the files of these ranks to a device that is always full."""
    names = {f"rank_{rank:05d}.safetensors" for rank in ranks}

    def open_file(path: Path, mode: str) -> Any:
        return open("/dev/full" if path.name in names else path, mode)

    monkeypatch.setattr(rank_file_module, "open", open_file, raising=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("full", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_full_disk_fails_the_save_and_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: tuple[int, ...]
) -> None:
    ranks = Ranks(tmp_path, world_size=3).saved(1)
    with monkeypatch.context() as patch:
        no_space_for(patch, *full)
        ranks.save(2)
        errors = ranks.errors()
    assert [type(error) for error in errors] == [UserError, ReportedByRank0, ReportedByRank0]
    assert not any("\n" in str(error) for error in errors)
    assert all(str(error).startswith(f"cannot write {tmp_path / '2'}: ") for error in errors)
    where = f"(rank{'s' if len(full) > 1 else ''} {', '.join(map(str, full))})"
    assert str(errors[0]).endswith(where)
    for rank in {0, *full}:
        assert "no space left on the disk" in str(errors[rank])
    # Only the old checkpoint remains, and the next save succeeds.
    assert sorted(os.listdir(tmp_path)) == ["1", "latest"]
    assert damage(tmp_path / "1") is None
    ranks.saved(3)
    assert list_checkpoints(tmp_path) == [1, 3]


def test_an_error_is_raised_by_check_or_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_space_for(monkeypatch, 0)
    (writer,) = Ranks(tmp_path, world_size=1).writers

    def save(step: int) -> None:
        writer.save(step, rank_share(TENSORS, 0, 1), shapes_of(TENSORS), {}, {})

    save(1)
    for thread in threading.enumerate():  # it may have ended already
        if thread.name == "checkpoint 1":
            thread.join(20)
    with pytest.raises(UserError, match="no space left"):
        writer.check()
    writer.check()  # raised only once
    save(2)
    with pytest.raises(UserError, match="no space left"):
        save(3)


def test_no_space_for_state_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path).saved(1)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_module, "seal", full)
    ranks.save(2)
    own, other = ranks.errors()
    assert str(own).startswith(f"cannot write {tmp_path / '2'}: no space left on the disk")
    assert "rank 0 gave it up" in str(other)
    assert sorted(os.listdir(tmp_path)) == ["1", "latest"]


def test_a_failed_rename_keeps_the_old_checkpoint_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path).saved(1)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.startswith(".writing") and target == tmp_path / "1":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    ranks.save(1)
    assert "permission denied" in str(ranks.errors()[0])
    assert sorted(os.listdir(tmp_path)) == ["1", "latest"]
    assert damage(tmp_path / "1") is None


def test_a_rank_that_never_reports_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "PATIENCE_S", 0.2)
    for present, message in ((0, "ranks 1, 2 did not report"), (1, "rank 0 did not finish it")):
        writer = Ranks(tmp_path, world_size=3).writers[present]
        writer.save(1, rank_share(TENSORS, present, 3), shapes_of(TENSORS), {}, {})
        with pytest.raises(UserError, match=message):
            writer.finish()
        assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([(0, 0, 12), (1, 6, 6)], r"tensor model/a: elements 6 to 11 of 12 occur more than once"),
        ([(0, 0, 4), (1, 6, 6)], r"tensor model/a: elements 4 to 5 of 12 are missing"),
        ([(0, 0, 6), (1, 6, 5)], r"tensor model/a: elements 11 to 11 of 12 are missing"),
        ([(0, 0, 6), (1, 6, 7)], r"tensor model/a has elements 6 to 12 of only 12"),
    ],
)
def test_every_element_comes_from_exactly_one_rank(
    tmp_path: Path, fragments: list[tuple[int, int, int]], message: str
) -> None:
    ranks = Ranks(tmp_path)
    for rank, start, count in fragments:
        pieces = [Fragment("model/a", start, torch.zeros(count))]
        ranks.writers[rank].save(1, pieces, {"model/a": [3, 4]}, {}, {})
    with pytest.raises(RuntimeError, match=message):
        ranks.writers[0].finish()
    assert list_checkpoints(tmp_path) == []


def test_differing_types_and_tensors_without_a_shape_are_errors(tmp_path: Path) -> None:
    for second, message in (("model/a", "is float32 on one rank and float64 on rank 1"), ("model/b", "has no shape")):
        ranks = Ranks(tmp_path)
        ranks.writers[0].save(1, [Fragment("model/a", 0, torch.zeros(2))], {"model/a": [4]}, {}, {})
        ranks.writers[1].save(1, [Fragment(second, 2, torch.zeros(2).double())], {"model/a": [4]}, {}, {})
        with pytest.raises(RuntimeError, match=message):
            ranks.writers[0].finish()


def test_invalid_calls_are_refused_at_once(tmp_path: Path) -> None:
    (writer,) = Ranks(tmp_path, world_size=1).writers
    cases = [
        ([Fragment("a", 0, torch.zeros(2, 2))], {}, "2 axes"),
        ([Fragment("a", 0, torch.zeros(2, dtype=torch.complex64))], {}, "complex64"),
        ([Fragment("a", 0, torch.zeros(2)), Fragment("a", 0, torch.zeros(3))], {}, "two fragments"),
        ([], {"tensors": 1}, "may not be called"),
    ]
    for fragments, facts, message in cases:
        with pytest.raises(ValueError, match=message):
            writer.save(1, fragments, {}, {}, facts)
    with pytest.raises(ValueError, match="attempt"):
        CheckpointWriter(tmp_path, 0, 1, 1, 0, attempt="a-b")


# Leftovers of killed runs.


def test_leftovers_of_another_attempt_are_never_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of a killed run had written and reported its file; in the next run, rank 1 is slow."""
    first = Ranks(tmp_path, attempt="killed")
    old = {name: tensor - 100 for name, tensor in TENSORS.items()}
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "PATIENCE_S", 0.1)
        first.writers[1].save(2, rank_share(old, 1, 2), shapes_of(old), {}, {})
        with pytest.raises(UserError):
            first.writers[1].finish()
    assert len(os.listdir(tmp_path / ".writing-2-killed-1")) == 2
    kept = shutil.copytree(tmp_path / ".writing-2-killed-1", tmp_path.parent / "kept")

    again = Ranks(tmp_path, attempt="again")
    assert os.listdir(tmp_path) == []
    shutil.copytree(kept, tmp_path / ".writing-2-killed-1")  # as if it had been removed too late
    again.writers[0].save(2, rank_share(TENSORS, 0, 2), shapes_of(TENSORS), {}, {})
    time.sleep(0.1)
    assert list_checkpoints(tmp_path) == []
    again.writers[1].save(2, rank_share(TENSORS, 1, 2), shapes_of(TENSORS), {}, {})
    assert again.errors() == [None, None]
    assert torch.equal(CheckpointReader(tmp_path / "2").tensor("model/a.weight"), TENSORS["model/a.weight"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", ["earlier", "same"])
def test_a_kill_at_any_file_operation_leaves_a_complete_checkpoint(tmp_path: Path, existing: str) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(tmp_path), existing]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.split()[-1])
    assert kills > 15, done.stdout
