"""Figures: matplotlib drawings written as PNG files, and their place on a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib import figure as matplotlib_figure

from shodh_moe.base.files import atomic_file
from shodh_moe.report.style import png


@dataclass(frozen=True)
class Figure:
    """A PNG file on a page.

    Attributes:
        path: the file.
        alternative: text for readers who do not see the figure.
        caption: text below the figure, formatted as `shodh_moe.report.page.Text`; empty for none.
    """

    path: Path
    alternative: str
    caption: str = ""

    def base64(self) -> str:
        """The file's content as base64, for a page that needs no other file."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


def write_figures(drawings: Mapping[str, matplotlib_figure.Figure | None], folder: Path) -> list[Path]:
    """Write each drawing to ``folder/<name>.png``; the folder is made if missing.

    Args:
        drawings: drawings by name; None if there were no data, which removes an older file of that name.

    Returns:
        the paths of the files written, in order.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = []
    for name, drawing in drawings.items():
        path = folder / f"{name}.png"
        if drawing is None:
            path.unlink(missing_ok=True)
            continue
        content = png(drawing)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return paths
