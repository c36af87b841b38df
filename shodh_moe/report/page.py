"""Sections of text, tables and figures, rendered as one self-contained HTML page or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shodh_moe.base.files import write_text
from shodh_moe.report.figure import Figure
from shodh_moe.report.table import Table


@dataclass(frozen=True)
class Text:
    """A paragraph. ``**bold**`` and `` `code` `` are the only markup."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph in grey, such as one that says what was not measured."""

    text: str


@dataclass(frozen=True)
class Box:
    """Highlighted paragraphs.

    Attributes:
        lines: formatted as `Text`.
        mood: ``good`` for green, ``bad`` for red, empty for grey.
    """

    lines: Sequence[str]
    mood: str = ""


@dataclass(frozen=True)
class Preformatted:
    """Text shown as it is, in a fixed-width font.

    Attributes:
        text: as the page shows it.
        markdown: the same for Markdown; a code block of ``text`` if empty.
    """

    text: str
    markdown: str = ""


@dataclass(frozen=True)
class Link:
    """A paragraph that leads to another file in the folder of the page."""

    file: str
    text: str


Block = Text | Heading | Note | Box | Preformatted | Link | Table | Figure


@dataclass(frozen=True)
class Section:
    """A titled part of a page, with its blocks in reading order. Tables without rows are left out."""

    title: str
    blocks: Sequence[Block] = ()

    @property
    def anchor(self) -> str:
        """The id that links within the page lead to."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Page:
    """A page: its title, sections, a subtitle in grey, and the browser's title if it differs from the page's."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""
    browser_title: str = ""

    def html(self) -> str:
        """The page as one HTML file that loads nothing else and has no scripts; all text is escaped."""
        return render("page.html.j2", page=self)

    def write(self, path: Path) -> Path:
        """Write `html` to ``path``, and return ``path``. Raises: UserError: the folder cannot be written."""
        write_text(path, self.html())
        return path


def markdown(sections: Iterable[Section]) -> str:
    """The sections as GitHub Markdown, without figures."""
    parts: list[str] = []
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Text | Note):
                parts.append(block.text)
            elif isinstance(block, Heading):
                parts.append(f"### {block.text}")
            elif isinstance(block, Link):
                parts.append(f"[{block.text}]({block.file})")
            elif isinstance(block, Box):
                parts += block.lines
            elif isinstance(block, Preformatted):
                parts.append(block.markdown or f"```\n{block.text}\n```")
            elif isinstance(block, Table) and block.rows:
                parts.append(block.markdown())
    return "\n\n".join(parts) + "\n"


def render(template: str, **values: Any) -> str:
    """Fill in one of the package's templates; all text is escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)


def formatted(text: str) -> Markup:
    """Escape ``text``, and turn its ``**bold**`` and `` `code` `` into HTML."""
    pattern = r"`(?P<code>.+?)`|\*\*(?P<bold>.+?)\*\*"
    escaped = str(Markup.escape(text))
    return Markup(
        re.sub(pattern, lambda m: f"<code>{m['code']}</code>" if m["code"] else f"<b>{m['bold']}</b>", escaped)
    )


_ENVIRONMENT = Environment(
    loader=PackageLoader("shodh_moe.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"formatted": formatted, "kind": lambda block: type(block).__name__}
