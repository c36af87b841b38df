"""Tables, figures, sections and pages of reports, and the escaping of everything that a page quotes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import figure as matplotlib_figure

from shodh_moe.base.errors import UserError
from shodh_moe.report import style, write_report
from shodh_moe.report.figure import Figure, write_figures
from shodh_moe.report.page import Box, Heading, Note, Page, Preformatted, Section, Text, formatted, markdown
from shodh_moe.report.table import Table, number
from tests.report.test_report import EXPERTS, LAYERS, evaluation_metrics, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = """<script>alert("1")</script> & 'quoted' "twice\""""
ESCAPED = "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#39;quoted&#39; &#34;twice&#34;"


class Parsed(HTMLParser):
    """Return the start tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_table_as_text_and_markdown() -> None:
    table = Table(("domain", "error"), [("channel", "0.5"), ("a|b", "12.25")], frozenset({1}))
    assert table.text() == "domain   error\n-------  -----\nchannel    0.5\na|b      12.25"
    assert table.markdown() == "| domain | error |\n| :-- | --: |\n| channel | 0.5 |\n| a/b | 12.25 |"


def test_numbers_are_formatted() -> None:
    values = (None, True, False, 12345, 0.123456, 12345.6, [1, 2.5], "word")
    assert [number(value) for value in values] == ["-", "yes", "no", "12,345", "0.1235", "12,346", "1, 2.5", "word"]


def test_only_bold_and_code_are_markup() -> None:
    assert formatted("**a** `b**c**` <b>d</b>") == "<b>a</b> <code>b**c**</code> &lt;b&gt;d&lt;/b&gt;"
    assert formatted("2 * 3 ** 4") == "2 * 3 ** 4"


def test_a_figure_without_data_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "old.png").write_bytes(b"of an earlier report")
    paths = write_figures({"old": None, "new": matplotlib_figure.Figure(figsize=(1, 1))}, folder)
    assert paths == [folder / "new.png"]
    assert [path.name for path in folder.iterdir()] == ["new.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_every_block_is_escaped_on_the_page(tmp_path: Path) -> None:
    (path,) = write_figures({"figure": matplotlib_figure.Figure(figsize=(1, 1))}, tmp_path)
    blocks = [
        Text(EVIL),
        Heading(EVIL),
        Note(EVIL),
        Box([EVIL]),
        Preformatted(EVIL),
        Table((EVIL,), [(EVIL,), ("yes",)]),
        Figure(path, EVIL, EVIL),
    ]
    page = Page(EVIL, [Section(EVIL, blocks)], EVIL).html()
    assert "<script" not in page
    parsed = Parsed(page)
    assert "script" not in parsed.tags
    # In <title>, <h1>, the subtitle, the link, <h2>, and nine times in the blocks, including once as an attribute.
    assert page.count(ESCAPED) == 2 + 1 + 2 + 9
    assert parsed.text.count(EVIL) == 13
    assert ("alt", EVIL) in parsed.attributes
    assert ("class", "yes") in parsed.attributes
    known = {"lang", "charset", "name", "content", "class", "href", "id", "alt", "src"}
    assert {name for name, _ in parsed.attributes} <= known


def test_sections_as_markdown(tmp_path: Path) -> None:
    table, empty = Table(("a",), [("1",)]), Table(("b",), [])
    blocks = [Text("**text**"), Heading("part"), Note("note"), Box(["one", "two"]), table, empty]
    rule, config = Preformatted("shown", markdown="``as is``"), Preformatted("x: 1")
    sections = [Section("First", blocks), Section("Second", [rule, config, Figure(tmp_path / "no.png", "left out")])]
    assert markdown(sections).split("\n\n") == [
        *("## First", "**text**", "### part", "note", "one", "two", "| a |\n| :-- |\n| 1 |"),
        *("## Second", "``as is``", "```\nx: 1\n```\n"),
    ]
    assert "<th>b</th>" not in Page("title", sections[:1]).html()


LONG = "a-run-with-a-long-name-" * 4


def test_links_and_long_names_can_break() -> None:
    """A page without a place to break a line would be wider than a phone."""
    page = Page(LONG, [Section("Flow fields"), Section("Cost")]).html()
    assert re.search(r"^nav \{.* flex-wrap: wrap;", page, re.MULTILINE)
    assert re.search(r"^body \{[^}]* overflow-wrap: anywhere;", page, re.MULTILINE)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_page_is_not_wider_than_a_phone(tmp_path: Path) -> None:
    blocks = [Text(LONG), Note(LONG), Box([f"**{LONG}**"]), Text(f"`{LONG}`"), Preformatted(LONG), Heading(LONG)]
    table = Table((LONG, "b"), [(LONG, "1")], frozenset({1}))
    titles = ("Summary", "Flow fields", "Spectra", "Rollout", "Routing", "Training", "Divergence", "Cost", "Config")
    page = Page(LONG, [Section(title, [*blocks, table]) for title in (*titles, LONG)], subtitle=LONG).html()
    script = "<script>document.title = [innerWidth, document.documentElement.scrollWidth]</script>"
    # In a frame, because the window of a browser may have a smallest width.
    frame = html.escape(page.replace("</body>", f"{script}<script>parent.document.title = document.title</script>"))
    path = tmp_path / "phone.html"
    path.write_text(f'<iframe width="360" height="800" srcdoc="{frame}"></iframe>', encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(\d+),(\d+)</title>", found)
    assert title, found[:300]
    assert int(title[2]) <= int(title[1]) <= 360


def test_links_lead_to_sections() -> None:
    page = Page("title", [Section("Flow fields"), Section("Cost")]).html()
    assert re.findall(r'href="#([^"]*)"', page) == re.findall(r'<h2 id="([^"]*)"', page) == ["flow-fields", "cost"]


@pytest.mark.parametrize("name", ['<script>alert("1")</script>', "a&b", "'\"><img src=x>"])
def test_names_in_a_run_are_escaped_in_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(style, "DPI", 40)  # drawing takes most of the time
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    metrics = evaluation_metrics(LAYERS, EXPERTS)
    metrics |= {"run": name, "routing": {}}  # a domain of such a name is refused
    metrics["divergence_table"] = [{**row, "what": name, "operator": name} for row in metrics["divergence_table"]]
    metrics["divergence"]["norm"] = metrics["divergence_table"][0]["norm"] = name
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "environment.json").write_text(json.dumps({name: name}))
    (folder / "config.yaml").write_text(name)
    page = write_report(folder).read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert name not in page
    assert "script" not in parsed.tags
    assert ("src", "x") not in parsed.attributes
    assert parsed.text.count(name) > 8
    # Names of domains become parts of file names, so they are refused instead.
    metrics["domains"] = {name: metrics["domains"]["open_channel"]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="a domain named"):
        write_report(folder)
