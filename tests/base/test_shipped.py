"""Configs that come with the package are found by their path in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.shipped import FOLDERS, shipped_file, shipped_folder
from shodh_moe.config.load import load_config, read_yaml


def test_the_packages_own_config_is_used_if_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.yaml").data.grid == [32, 32, 32]
    assert read_yaml(Path("configs/merge/example.yaml"))["merge_method"] == "ccm"
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text("seed: 7\n")
    assert load_config("configs/quickstart.yaml").seed == 7


@pytest.mark.parametrize("path", ["configs/nowhere.yaml", "configs/../setup.py", "quickstart.yaml", "other/configs/x"])
def test_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_file(Path(path)) == Path(path)
    with pytest.raises(UserError, match=f"cannot read config {path}"):
        load_config(path)


def test_both_folders_are_there() -> None:
    assert [(shipped_folder(name) / "README.md").exists() for name in FOLDERS] == [True, True]
