"""Colours and matplotlib helpers shared by all figures. pyplot is not used, so no global state changes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DPI = 144
WIDTH = 10.5  # inches, a full line of the page
TITLE, LABEL, TICK = 12, 10.5, 9.5
TRUE_STYLE = {"color": "black", "linestyle": "-", "linewidth": 2.0}
PRED_STYLE = {"color": "#c2410c", "linestyle": "-", "linewidth": 1.8}
RECONSTRUCTION_STYLE = {"color": "#2563eb", "linestyle": "--", "linewidth": 1.5}
BASELINE_STYLE = {"color": "#6b7280", "linestyle": ":", "linewidth": 2.0}
DOMAIN_COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#1d4ed8", "#4d7c0f")
LINESTYLES = ("-", "--", "-.", ":")


def words(name: str) -> str:
    """Replace underscores by spaces: ``open channel``."""
    return name.replace("_", " ")


def domain_colour(index: int) -> str:
    return DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]


def expert_colours(experts: int) -> tuple[ListedColormap, BoundaryNorm]:
    """Return one colour per expert: easy to tell apart for up to 10 experts, an even ramp for more."""
    if experts <= 10:
        # The first two also differ in brightness: most runs have two experts, and some reports are printed in grey.
        order = (
            "#1e3a8a",
            "#f59e0b",
            "#10b981",
            "#db2777",
            "#7dd3fc",
            "#7c3aed",
            "#84cc16",
            "#991b1b",
            "#94a3b8",
            "#111827",
        )
        colours: Sequence[object] = order[:experts]
    else:
        colours = [colormaps["turbo"](value) for value in np.linspace(0.02, 0.98, experts)]
    return ListedColormap(colours), BoundaryNorm(np.arange(experts + 1) - 0.5, experts)


def expert_colour(expert: int, experts: int) -> tuple[float, ...]:
    colours, norm = expert_colours(experts)
    return tuple(colours(norm(expert)))


def panels(
    count: int, columns: int, height: float, *, title: str = "", images: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``count`` panels, ``columns`` per row, each ``height`` inches high; spare places stay blank.

    With ``images`` the panels keep their aspect ratio, and the space that this leaves between them is removed.
    """
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(WIDTH, rows * height + (0.4 if title else 0.0)),
        dpi=DPI,
        layout="compressed" if images else "constrained",
    )
    if title:
        figure.suptitle(title, fontsize=TITLE + 1, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.set_visible(False)
    return figure, grid[:count]


def label(axes: Axes, title: str, x: str, y: str, *, grid: bool = True) -> None:
    """Set the title and the axis labels in the common font sizes, and draw a light grid."""
    axes.set_title(title, fontsize=TITLE)
    axes.set_xlabel(x, fontsize=LABEL)
    axes.set_ylabel(y, fontsize=LABEL)
    axes.tick_params(labelsize=TICK)
    if grid:
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)


def legend(axes: Axes, **options: object) -> None:
    """Add a legend if any artist has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=TICK, framealpha=0.9, **options)


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Draw one legend below all panels, which are too narrow to hold it. Each handle carries its label."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False)


def colour_bar(
    figure: Figure, image: object, axes: Axes | Sequence[Axes], name: str = "", **options: object
) -> Colorbar:
    """Draw the colour scale of an image beside its axes; ``options`` are those of `Figure.colorbar`."""
    bar = figure.colorbar(image, ax=axes, **options)
    if name:
        bar.set_label(name, fontsize=TICK)
    bar.ax.tick_params(labelsize=TICK)
    return bar


def log_y(axes: Axes) -> None:
    """Make the y axis logarithmic if the lines have positive values."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()] or [np.zeros(0)])
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size:
        axes.set_yscale("log", nonpositive="mask")
        if positive.max() / positive.min() < 300:
            plain_ticks(axes.yaxis)


def plain_ticks(axis: Axis) -> None:
    """Put plain ticks at 1, 2, 5, 10: default logarithmic ticks overlap or are too few below three decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    """Render as PNG, cropped to the drawing: panels of fixed aspect ratio leave blank strips above and below."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
