"""Figures of the benchmark: error against step, and middle planes of forecasts with their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shodh_moe.forecast.config import OURS, ForecastConfig
from shodh_moe.forecast.measure import picture_path
from shodh_moe.forecast.plan import finals
from shodh_moe.forecast.verdict import title
from shodh_moe.report import style
from shodh_moe.report.figure import write_figures
from shodh_moe.report.run.fields import SPEED_UNIT, cut_name
from shodh_moe.report.run.load import Array

COLOURS = {OURS: "#c2410c", "fno": "#1d4ed8", "uno": "#0d9488", "unet": "#7c3aed", "dpot": "#f59e0b"}
BASELINE_LINES = (":", "-.", "--")
Arrays = dict[str, Array]


def draw(bench: ForecastConfig, summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures of a summary into ``folder`` and return their paths."""
    names = {"true": "true"} | {model: finals(bench, model)[0].name for model in bench.models}
    planes = {model: _read(picture_path(bench, name)) for model, name in names.items()}
    figures = {"error": error_by_step(summary)}
    for domain in summary["models"][OURS]["domains"]:
        figures[f"fields_{domain}"] = fields(planes, domain, summary["steps"])
    return write_figures(figures, folder)


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def error_by_step(summary: dict[str, Any]) -> Figure:
    """Draw the velocity nRMSE of every model against the step, one panel per domain."""
    domains = list(summary["models"][OURS]["domains"])
    figure, grid = style.panels(len(domains), 2, 4.2)
    steps = np.arange(1, summary["steps"] + 1)
    for axes, domain in zip(grid, domains, strict=True):
        lines = iter(BASELINE_LINES)
        for name, model in summary["models"].items():
            if domain not in model["domains"]:
                continue
            found = model["domains"][domain]["nrmse"]["velocity"]
            mean, low, high = (np.array(found[key], dtype=float) for key in ("mean", "low", "high"))  # None is NaN
            if "seeds" in model:
                look: dict[str, Any] = {"color": COLOURS[name], "linewidth": 2.2 if name == OURS else 1.5}
                axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            else:
                look = {"color": "0.4", "linestyle": next(lines), "linewidth": 1.5}
            axes.plot(steps, mean, label=title(name), marker="o", markersize=3.5, **look)
        # A forecast that blows up, as the linear extrapolation does, must not squeeze the others.
        axes.set_ylim(0, 1.1 if axes.get_ylim()[1] > 1.1 else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        style.label(axes, style.words(domain), "step (snapshots)", "velocity nRMSE (no unit)")
    style.legend_below(figure, grid[0].get_legend_handles_labels()[0], 5)
    return figure


def fields(planes: dict[str, Arrays], domain: str, steps: int) -> Figure:
    """Draw the speed of truth and forecasts, and below each the length of its error, at the first and last step.

    Args:
        planes: arrays of `measure._write_pictures` by model, with the ``true`` ones.
    """
    solid = planes["true"][f"{domain}/solid"] > 0.5
    true_N3 = planes["true"][f"{domain}/velocity"]
    shown = sorted({0, steps - 1})
    columns = len(planes)
    figure, grid = style.panels(
        2 * len(shown) * columns,
        columns,
        10.5 / columns,
        title=f"{style.words(domain)}, {cut_name(domain)}",
        images=True,
    )
    for row, step in enumerate(shown):
        speed = np.linalg.norm(true_N3[step], axis=0)
        largest = float(speed.max()) or 1.0
        for column, (name, arrays) in enumerate(planes.items()):
            velocity = arrays[f"{domain}/velocity"][step]
            error = np.linalg.norm(velocity - true_N3[step], axis=0)
            for part, values in enumerate((np.linalg.norm(velocity, axis=0), error)):
                axes = grid[(2 * row + part) * columns + column]
                if name == "true" and part:
                    axes.set_visible(False)
                    continue
                image = axes.imshow(
                    np.where(solid, np.nan, values),
                    origin="lower",
                    cmap="magma" if part else "viridis",
                    vmin=0,
                    vmax=largest / 2 if part else largest,
                )
                axes.set_facecolor("0.85")
                axes.set_xticks([])
                axes.set_yticks([])
                label = "error" if part else title(name)
                axes.set_title(f"{label}, step {step + 1}", fontsize=style.TICK)
                if column == columns - 1:
                    style.colour_bar(figure, image, axes, SPEED_UNIT, fraction=0.05, pad=0.02)
    return figure
