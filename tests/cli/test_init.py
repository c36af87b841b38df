"""`shodh init`: the files of a new project, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.cli import main
from shodh_moe.config.load import load_config
from tests.tiny import refused, tree

ROOT = Path(__file__).resolve().parents[2]


def test_it_writes_a_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "deep/flows"
    assert main(["init", str(folder)]) == 0
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert set(tree(folder)) == examples | {"config.yaml", ".gitignore"}
    assert load_config(folder / "config.yaml") == load_config(ROOT / "configs/quickstart.yaml")
    assert "shodh run --config config.yaml" in capsys.readouterr().out
    assert list(folder.parent.iterdir()) == [folder]


def test_it_never_writes_to_a_folder_that_exists(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    refused(capfd, "init", str(tmp_path / "mine"), says=("mine exists", "give a new folder"))
    (tmp_path / "file").write_text("")
    refused(capfd, "init", str(tmp_path / "file/flows"), says=("cannot write",))
    assert set(tree(tmp_path)) == {"mine", "file"}
