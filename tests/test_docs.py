"""The documentation: it builds as a site without a warning, its commands exist, and so do the tests that it names."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shodh_moe.cli.main import _parser
from tests.test_project import EXPECTED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs/README.md",
]
PAGES += [ROOT / "examples/README.md"]

pytestmark = pytest.mark.timeout(300)  # the site takes 6 s of processor time, and the machine may be busy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_example(site: Path) -> None:
    pages = [path.stem for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]]
    assert [name for name in pages if not (site / f"{name}.html").exists()] == []
    navigation = yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert [name for name in pages if f"{name}.md" not in navigation] == []


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    """Also those that the theme and the references make; anchors are checked while the site is built."""
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    broken = {
        (path.name, link)
        for path in pages
        for link in re.findall(r'(?:href|src)="([^"#?]+)', path.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:|//", link) and not (path.parent / link).exists()
    }
    assert broken == set()


def test_the_site_asks_no_other_server(site: Path) -> None:
    loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]*)', (site / "index.html").read_text())
    assert loaded == []


def test_an_example_becomes_a_tutorial(site: Path) -> None:
    text = (site / "first_forecast.html").read_text(encoding="utf-8")
    assert "<h1" in text
    assert "A first forecast" in text
    assert "largest velocity in solids 0.0e+00" in text
    assert (site / "outputs/first_forecast.png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "docs/outputs").glob("*.txt")), ids=lambda path: path.stem)
def test_the_kept_output_is_an_examples_own(path: Path) -> None:
    shown = path.read_text(encoding="utf-8")
    assert len(shown) < 3000
    for words in EXPECTED[f"{path.stem}.py"]:
        assert re.search(words, shown), words


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `shodh` command in a page's blocks and code, without placeholders and shell syntax."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [line.strip() for line in text.splitlines() if re.match(r"( {4,}|(\.venv/bin/)?shodh )", line)]
    for line in blocks + re.findall(r"`([^`\n]+)`", text):
        found = re.match(r"(?:\.venv/bin/)?shodh ((?:[a-z]+ ?)+.*)", line)
        if found and not re.search(r"[|<>…]|\.\.\.", found[1]):
            yield shlex.split(found[1], comments=True)


def complaint(words: list[str]) -> str:
    """Return what is wrong with a command, or "". One without its arguments is a mention of it, and N is a number."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            options, rest = _parser().parse_known_args(["1" if word == "N" else word for word in words])
    except SystemExit:
        return "" if re.search("are required|expected one argument", said.getvalue()) else said.getvalue()
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        return f"unknown {unknown[0]}"
    config = str(getattr(options, "config", ""))
    return f"no {config}" if config.startswith("configs/") and not (ROOT / config).exists() else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_exist(page: Path) -> None:
    """Every command, option and config that a page shows is one."""
    assert [(shlex.join(words), why) for words in commands(page) if (why := complaint(words))] == []


def test_a_wrong_command_is_found() -> None:
    assert "invalid choice" in complaint(["dta", "check", "x"])
    assert complaint(["data", "check", "x", "--sklip-bad"]) == "unknown --sklip-bad"
    assert complaint(["run", "--config", "configs/nowhere.yaml"]) == "no configs/nowhere.yaml"
    assert complaint(["run", "--config", "configs/quickstart.yaml", "seed=1"]) == ""


def test_commands_are_found() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 80


def test_the_day_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs/day.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in rows[1:]:
        named = re.findall(r"tests/[\w./]*", row.split("|")[-2])
        assert named, row
        assert [path for path in named if not (ROOT / path).exists()] == []
