"""Finding the checkpoint that a path refers to, for every kind of path."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint import Damaged, checkpoints_at, resolve_checkpoint
from tests.checkpoint.ranks import Ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Ranks(tmp_path / "run" / "checkpoints").saved(9).saved(10)
    return tmp_path / "run"


def test_paths_of_a_run_of_its_checkpoints_and_of_one_checkpoint(run: Path) -> None:
    steps = [run / "checkpoints" / step for step in ("9", "10")]
    assert checkpoints_at(run) == checkpoints_at(run / "checkpoints") == steps
    assert resolve_checkpoint(run) == resolve_checkpoint(run / "checkpoints") == steps[1]
    for step in steps:
        assert checkpoints_at(step) == [step]
        assert resolve_checkpoint(step) == step


def test_a_renamed_checkpoint(run: Path) -> None:
    path = (run / "checkpoints" / "9").rename(run.parent / "kept")
    assert checkpoints_at(path) == [path]
    assert resolve_checkpoint(path) == path


def test_a_run_without_checkpoints_and_unrelated_folders(tmp_path: Path) -> None:
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert checkpoints_at(tmp_path / "new") == []
    assert resolve_checkpoint(tmp_path / "new") is None
    (tmp_path / "other").mkdir()
    for path, reason in ((tmp_path / "other", "state.json is missing"), (tmp_path / "nowhere", "it does not exist")):
        assert checkpoints_at(path) is None
        with pytest.raises(Damaged, match=reason):
            resolve_checkpoint(path)


def test_damaged_checkpoints_are_refused_or_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, older = run / "checkpoints" / "10", run / "checkpoints" / "9"
    (newest / "state.json").unlink()
    with pytest.raises(Damaged, match=r"state\.json is missing"):
        resolve_checkpoint(newest)
    assert resolve_checkpoint(run) == older
    assert f"checkpoint {newest} is refused" in capsys.readouterr().out
    (older / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="can be used"):
        resolve_checkpoint(run)
