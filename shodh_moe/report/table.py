"""A table of strings, printed as plain text or Markdown; pages render it with templates/page.html.j2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of cells below a heading row.

    Attributes:
        head: column titles.
        rows: rows of cells, one per title.
        numeric: indices of the columns that are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()

    def text(self) -> str:
        """The table in fixed-width columns for a terminal."""
        lines = [tuple(self.head), *map(tuple, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        padded = [
            "  ".join(
                cell.rjust(width) if i in self.numeric else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        padded.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(line.rstrip() for line in padded)

    def markdown(self) -> str:
        """The table as GitHub Markdown. A ``|`` within a cell becomes ``/``: it would start another column."""
        line = ["--:" if column in self.numeric else ":--" for column in range(len(self.head))]
        return "\n".join(
            f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (self.head, line, *self.rows)
        )


def number(value: Any) -> str:
    """Format a cell: four significant digits, ``-`` for None, yes or no for a bool, lists separated by commas."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(number, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
