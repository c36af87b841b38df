"""The audit as one page: text, tables and pictures in a single file that needs nothing else."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh_moe.audit.sections import Section, sections
from shodh_moe.base.files import write_text
from shodh_moe.report.page import PAGE
from shodh_moe.report.tables import to_html

TITLE = "Does the mixture of experts end negative transfer?"
GOOD, BAD = ("shown", "no harm to end"), ("refuted",)
CAPTIONS = {
    "transfer": "Right of the black line joint training costs accuracy. Paired by seed.",
    "four": "Left of the black line the mixture is better than the dense model of the same active size.",
    "load": """Every seed is a line. Domains that part and stay apart have experts of their own: of which number
    differs between seeds, so the share is that at the expert which serves the first domain in the end.""",
    "gradients": """Below 0 a step that helps one domain hurts the other. Dotted: how well two halves of one domain's
    batch agree, the most that could be hoped for. A line ends where an expert sees one domain only.""",
    "swap": "Bars: mean over seeds. 1 (black line): it does not matter which expert the tokens go to.",
    "relearning": "A solid line below the dashed one: what was learned before helps.",
    "routing_map": "Colour: the expert of each token in the middle plane, beside the solid fraction (one run).",
}


def write_page(summary: dict[str, Any], pictures: Sequence[Path], folder: Path) -> Path:
    """Writes ``folder/index.html``; returns its path.

    Args:
        summary: what `shodh_moe.audit.summary.summarise` returns.
        pictures: PNG files, of `shodh_moe.audit.pictures.draw`; they are put into the page.
        folder: is made if missing.

    Raises:
        UserError: the folder cannot be written.
    """
    all_sections = sections(summary)
    anchors = {section.title: re.sub(r"\W+", "-", section.title.lower()) for section in all_sections}
    links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for title, anchor in anchors.items())
    parts = [f"<h1>{TITLE}</h1>", f"<nav>{links}</nav>"]
    for section in all_sections:
        parts.append(f'<h2 id="{anchors[section.title]}">{html.escape(section.title)}</h2>')
        parts.append(_body(section, summary, pictures))
    path = folder / "index.html"
    write_text(path, PAGE.substitute(title=TITLE, body="\n".join(parts)))
    return path


def _body(section: Section, summary: dict[str, Any], pictures: Sequence[Path]) -> str:
    text = "".join(f"<p>{_bold(line)}</p>" for line in section.text)
    if section.title == "Verdict":
        answer = summary["verdicts"]["ends_negative_transfer"].get("main", {}).get("answer")
        mood = "good" if answer in GOOD else "bad" if answer in BAD else ""
        return f'<div class="verdict {mood}">{text}</div>'
    verbatim = f"<pre>{html.escape(section.verbatim.replace('``', ''))}</pre>" if section.verbatim else ""
    figures = [
        _figure(path, CAPTIONS[name]) for name in section.pictures for path in pictures if path.stem.startswith(name)
    ]
    return text + verbatim + "".join(figures) + "".join(to_html(table) for table in section.tables if table.rows)


def _bold(line: str) -> str:
    """Escaped, with ``**`` of markdown as bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(line))


def _figure(path: Path, caption: str) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
