"""A dataset is identified by the content of its files; files that have not changed are read once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh_moe.config import content
from shodh_moe.config.content import list_dataset, remember_content, times_of
from shodh_moe.config.paths import resolve_paths
from tests.tiny import CONFIG, config


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_hashes", {})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    for split in ("train", "valid", "test"):
        (folder / "data" / split).mkdir(parents=True)
        (folder / "data" / split / "a.hdf5").write_bytes(b"0" * 3_000_000)
    (folder / "stats.yaml").write_text("rms: 1\n")
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that have been read."""
    names: list[str] = []
    read = content.sha256

    def counted(path: Path) -> str:
        names.append(f"{path.parent.name}/{path.name}")
        return read(path)

    monkeypatch.setattr(content, "sha256", counted)
    return names


def content_of(dataset: Path, root: Path) -> str:
    return content.content_of(dataset, list_dataset(dataset), root)


def test_a_touch_and_a_copy_keep_the_identity(dataset: Path, tmp_path: Path) -> None:
    before = content_of(dataset, tmp_path)
    for path in dataset.rglob("*"):
        os.utime(path, (1, 1))
    assert content_of(dataset, tmp_path) == before
    shutil.copytree(dataset, tmp_path / "copy")
    assert content_of(tmp_path / "copy", tmp_path) == before


def test_a_touch_keeps_the_folders_of_tokenizer_and_latents(dataset: Path, tmp_path: Path) -> None:
    data = {**CONFIG["data"], "path": str(dataset)}
    mine = config(data=data, tokenizer={**CONFIG["tokenizer"], "root": str(tmp_path / "tokenizers")})
    before = resolve_paths(mine)
    os.utime(dataset / "data/train/a.hdf5")
    assert resolve_paths(mine) == before


def test_any_changed_byte_changes_the_identity(dataset: Path, tmp_path: Path) -> None:
    seen = {content_of(dataset, tmp_path)}
    path = dataset / "data/valid/a.hdf5"
    for place in (0, 1_500_000, 2_999_999):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"1")
        seen.add(content_of(dataset, tmp_path))
    (dataset / "stats.yaml").write_text("rms: 2\n")
    seen.add(content_of(dataset, tmp_path))
    path.rename(path.with_name("b.hdf5"))
    seen.add(content_of(dataset, tmp_path))
    assert len(seen) == 6


def test_later_processes_read_only_what_has_changed(
    dataset: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content_of(dataset, tmp_path / "tokenizers")
    assert len(hashed) == 4
    assert not (tmp_path / "tokenizers").exists()
    remember_content(dataset, tmp_path / "tokenizers")
    for _ in range(2):
        hashed.clear()
        monkeypatch.setattr(content, "_hashes", {})
        assert content_of(dataset, tmp_path / "tokenizers") == first
        assert hashed == []
    (dataset / "data/test/a.hdf5").write_bytes(b"2")
    assert content_of(dataset, tmp_path / "tokenizers") != first
    assert hashed == ["test/a.hdf5"]


def test_a_damaged_memory_is_ignored(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = content_of(dataset, tmp_path / "tokenizers")
    remember_content(dataset, tmp_path / "tokenizers")
    (memory,) = (tmp_path / "tokenizers").rglob("*.json")
    memory.write_text("[[1]")
    monkeypatch.setattr(content, "_hashes", {})
    assert content_of(dataset, tmp_path / "tokenizers") == first


def test_artefacts_named_after_times_are_used_while_the_times_last(
    dataset: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions named tokenizers and latents so."""
    data = {**CONFIG["data"], "path": str(dataset)}
    mine = config(data=data, tokenizer={**CONFIG["tokenizer"], "root": str(tmp_path / "tokenizers")})
    new = resolve_paths(mine)
    with monkeypatch.context() as patch:
        patch.setattr("shodh_moe.config.paths.content_of", lambda dataset, listing, root: times_of(dataset, listing))
        old = resolve_paths(mine)
    assert old.tokenizer != new.tokenizer
    old.tokenizer.mkdir(parents=True)
    hashed.clear()
    assert resolve_paths(mine) == old
    assert hashed == []
    os.utime(dataset / "stats.yaml", (1, 1))
    assert resolve_paths(mine) == new
