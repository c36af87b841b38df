"""README.md: its Python code runs, the paths that it and the main docs name exist, and it stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shodh_moe.inference.export import export
from tests.trained import GRID, make_run

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = "benchmarks|configs|docs|kernels|launch|shodh_moe|tests"
FILES = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_file() and path.suffix in (".py", ".md"))


def named_paths(text: str) -> set[str]:
    """Return the paths in this repository that a page names, relative to the root."""
    return {
        path.rstrip("./")
        for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*|{FILES})(?![\w<])", text)
        if "*" not in path
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model and its dataset."""
    folder = tmp_path_factory.mktemp("readme")
    export(make_run(folder), folder / "quickstart_model")
    return folder


def test_the_python_example_runs(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    assert "path/to/dataset" in blocks[0]
    code = blocks[0].replace("path/to/dataset", "theirs") + "print(tuple(predicted['velocity'].shape))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((10, 3, *GRID))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/promises.md"])
def test_every_named_path_exists(page: str) -> None:
    named = named_paths((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md"])
def test_every_link_has_a_target(page: str) -> None:
    path = ROOT / "docs" / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) < 900
