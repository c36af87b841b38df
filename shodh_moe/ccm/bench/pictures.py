"""Figures of the benchmark: error over alpha, error by row, error over the regime, bend of the path, fields.

Where rollouts blew up, lines have a gap and a bar is labelled "blew up".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from shodh_moe.ccm.bench.aims import READOUTS, ROWS, family_title
from shodh_moe.ccm.readout import BEND_TOLERANCE
from shodh_moe.report import style
from shodh_moe.report.figure import write_figures

Results = list[dict[str, Any]]
Summary = dict[str, Any]

COLUMNS = 3
CCM, ORACLE, OTHER, CONDITIONED = "#c2410c", "#f59e0b", "#94a3b8", "#16a34a"
LINE = {"linewidth": 1.6, "marker": ".", "markersize": 4.5}  # markers show a point even between two gaps
LINES: dict[str, dict[str, Any]] = {
    "anchor": {"color": "black", "linewidth": 2.0},
    "low": {"color": "#60a5fa", "linestyle": "--"},
    "high": {"color": "#1e3a8a", "linestyle": "--"},
    "average": {"color": "#6b7280", "linestyle": ":", "linewidth": 2.0},
    "ccm_coordinate": {"color": CCM, "marker": "o"},
    "ccm_scale": {"color": "#be185d", "marker": "s"},
    "ccm_prefix": {"color": "#7c3aed", "marker": "^"},
    "oracle": {"color": ORACLE, "linestyle": "-."},
    "conditioned": {"color": CONDITIONED, "linestyle": (0, (6, 2))},
}
REGIME_COLOURS = ("#1d4ed8", "#0d9488", "#ca8a04", "#be123c", "#6d28d9", "#4d7c0f")
WIDE = 8.0  # an axis is logarithmic if its largest value exceeds the smallest by this factor
MOST_ANCHORS = 3.0  # bars are cut at this multiple of the anchor's error; their value is printed beside them
MOST_BEND = 2.0  # upper limit of the axis of bends


def draw(results: Results, summary: Summary, folder: Path) -> list[Path]:
    """Draw all figures of the benchmark except the fields, and return their paths.

    Args:
        results: the result files; see `shodh_moe.ccm.bench.summary.summarise`.
        summary: what `summarise` returns for them.
        folder: where to write the figures; created if missing.

    Raises:
        UserError: the folder cannot be written.
    """
    drawings = {
        "alpha_curves": _alpha_curves(results),
        "ood": _ood(summary),
        "regimes": _regimes(summary),
        "straightness": _straightness(results),
    }
    return write_figures(drawings, folder)


def _by_family(results: Results) -> dict[str, Results]:
    names = dict.fromkeys(result["family"] for result in results)
    return {name: [result for result in results if result["family"] == name] for name in names}


def _values(values: Any) -> NDArray[np.float64]:
    """Convert errors to an array; those of rollouts that blew up become NaN, which is not drawn."""
    return np.array([np.nan if value is None or not np.isfinite(value) else value for value in values], dtype=float)


def _log_if_wide(axes: Axes) -> None:
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines() if len(line.get_ydata()) > 2]
    drawn = np.concatenate(lines or [np.zeros(0)])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if drawn.size and drawn.max() > WIDE * drawn.min():
        style.log_y(axes)
    else:
        axes.set_ylim(bottom=0.0)


def _alpha_curves(results: Results) -> Figure:
    families = _by_family(results)
    figure, grid = style.panels(len(families), COLUMNS, 3.7, title="Validation error along the path")
    for axes, (name, members) in zip(grid, families.items(), strict=True):
        coordinates = sorted({curve["coordinate"] for result in members for curve in result["curves"]})
        for number, s in enumerate(coordinates):
            colour = REGIME_COLOURS[number % len(REGIME_COLOURS)]
            curves = [curve["errors"] for result in members for curve in result["curves"] if curve["coordinate"] == s]
            alphas = sorted(curves[0], key=float)
            x = np.array([float(alpha) for alpha in alphas])
            seeds = np.stack([_values(curve.get(alpha) for alpha in alphas) for curve in curves])
            mean = seeds.mean(0)
            for line in seeds:
                axes.plot(x, line, color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(x, mean, color=colour, linewidth=1.8, label=f"s = {s:+g}")
            axes.axvline(s, color=colour, linestyle="--", linewidth=1.0)
            if np.isfinite(mean).any():
                least = int(np.nanargmin(mean))
                axes.plot(x[least], mean[least], "o", color=colour, markeredgecolor="black", markersize=7, zorder=5)
        style.label(axes, family_title(name), "alpha", "rollout nRMSE")
        _log_if_wide(axes)
        style.legend(axes, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.17))
    marks = [
        Line2D([], [], color="0.4", linewidth=1.8, label="mean over seeds"),
        Line2D([], [], color="0.4", linewidth=0.7, label="one seed"),
        Line2D([], [], color="0.4", linestyle="", marker="o", markeredgecolor="black", label="smallest"),
        Line2D([], [], color="0.4", linestyle="--", linewidth=1.0, label="alpha = s of the regime"),
    ]
    style.legend_below(figure, marks, 4)
    return figure


def _ood(summary: Summary) -> Figure:
    families = summary["families"]
    rows = [row for row in ROWS if any("ood" in family["rows"].get(row, {}) for family in families.values())]
    title = "OOD error: mean and 95 % interval"
    figure, grid = style.panels(len(families), COLUMNS, 1.5 + 0.3 * len(rows), title=title)
    for number, (axes, (name, family)) in enumerate(zip(grid, families.items(), strict=True)):
        estimates = {row: family["rows"][row]["ood"] for row in rows if "ood" in family["rows"].get(row, {})}
        anchor = estimates.get("anchor", {}).get("value")
        end = _bar_end([one["value"] for one in estimates.values()], anchor)
        for place, row in enumerate(rows):
            _bar(axes, place, row, estimates.get(row), end)
        if anchor is not None:
            axes.axvline(anchor, color="black", linewidth=1.3)
        first = number % COLUMNS == 0
        axes.set_yticks(range(len(rows)), [ROWS[row] for row in rows] if first else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.5 * end)
        style.label(axes, family_title(name), "rollout nRMSE", "")
        axes.grid(False, axis="y")
    marks = [
        Line2D([], [], color=CCM, linewidth=7, label="CCM"),
        Line2D([], [], color=ORACLE, linewidth=7, label="CCM, alpha not from a readout"),
        Line2D([], [], color=OTHER, linewidth=7, label="other"),
        Line2D([], [], color="black", linewidth=1.3, label="anchor"),
    ]
    style.legend_below(figure, marks, 4)
    return figure


def _bar_end(values: list[float | None], anchor: float | None) -> float:
    """The value at which bars are cut, so that an outlying row does not make the others too short to compare."""
    largest = max((value for value in values if value is not None), default=1.0)
    return min(largest, MOST_ANCHORS * anchor) if anchor else largest


def _bar(axes: Axes, place: int, row: str, estimate: dict[str, Any] | None, end: float) -> None:
    """Draw a bar with its interval and number; a bar longer than ``end`` is cut there."""
    text: dict[str, Any] = {"va": "center", "fontsize": style.TICK - 1}
    if estimate is None:
        axes.text(0.02 * end, place, "not measured", color="0.5", **text)
        return
    value = end if estimate["value"] is None else estimate["value"]
    cut = estimate["value"] is None or value > end
    colour = CCM if row in READOUTS else ORACLE if row in ("oracle", "wrong_sign") else OTHER
    axes.barh(place, min(value, end), 0.72, color=colour, hatch="///" if cut else None, edgecolor="white")
    tip = min(value, end)
    if not cut:
        low = max(estimate["low"] if estimate["low"] is not None else 0.0, 0.0)
        high = min(estimate["high"] if estimate["high"] is not None else 1.2 * end, 1.2 * end)
        axes.plot([low, high], [place, place], color="0.15", linewidth=1.3)
        tip = max(high, value)
    shown = "blew up" if estimate["value"] is None else f"{value:#.3g}"
    # White background, because the anchor's line may cross the number.
    axes.text(tip + 0.03 * end, place, shown, bbox={"color": "white", "pad": 0.6}, zorder=4, **text)


def _regimes(summary: Summary) -> Figure:
    families = summary["families"]
    figure, grid = style.panels(len(families), COLUMNS, 4.0, title="Error over the regime")
    for axes, (name, family) in zip(grid, families.items(), strict=True):
        regimes = sorted(family["regimes"], key=lambda regime: regime["coordinate"])
        axes.axvspan(-1, 1, color="0.94", linewidth=0)
        for row, look in LINES.items():
            measured = [regime for regime in regimes if row in regime["errors"]]
            errors = _values(regime["errors"][row] for regime in measured)
            if measured:
                where = [regime["coordinate"] for regime in measured]
                axes.plot(where, errors, **{**LINE, **look})
        style.label(axes, family_title(name), "coordinate s", "rollout nRMSE")
        _log_if_wide(axes)
    handles = [Line2D([], [], **{**LINE, **look}, label=ROWS[r]) for r, look in LINES.items()]
    handles.append(Line2D([], [], color="0.9", linewidth=7, label="between the endpoints"))
    style.legend_below(figure, handles, 5)
    return figure


def _straightness(results: Results) -> Figure:
    figure, (axes,) = style.panels(1, 1, 4.2)
    shown = [0.0]
    for number, (name, members) in enumerate(_by_family(results).items()):
        colour = style.domain_colour(number)
        lines = [bends for result in members if (bends := result.get("straightness", {}).get("bend"))]
        for position, bends in enumerate(lines):
            # The two experts lie on the line by definition.
            points = {-1.0: 0.0, 1.0: 0.0, **{float(alpha): value for alpha, value in bends.items()}}
            alphas = sorted(points)
            values = _values(points[alpha] for alpha in alphas)
            shown.extend(values[np.isfinite(values)])
            label = family_title(name) if position == 0 else None
            axes.plot(alphas, values, color=colour, linewidth=1.3, marker="o", markersize=3.5, alpha=0.85, label=label)
    axes.axhline(BEND_TOLERANCE, color="black", linestyle="--", linewidth=1.2, label=f"tolerance {BEND_TOLERANCE:g}")
    cut = max(shown) > MOST_BEND
    axes.set_ylim(0, MOST_BEND if cut else 1.08 * max(*shown, BEND_TOLERANCE))
    title = "Bend of the path between the experts, a line for each seed"
    style.label(axes, title + (f" (cut at {MOST_BEND:g})" if cut else ""), "alpha", "bend (no unit)")
    style.legend(axes, loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.14))
    return figure


def draw_fields(example: dict[str, NDArray[Any]], title: str, path: Path) -> None:
    """Draw one frame: the truth beside the predictions, and below each prediction its error (predicted - true).

    Args:
        example: images [H, W] named ``truth`` and any of ``anchor``, ``best_endpoint``, ``ccm``.
        path: the PNG file to write.

    Raises:
        UserError: the file cannot be written.
    """
    names = {"anchor": "anchor", "best_endpoint": "best endpoint", "ccm": "CCM"}
    names = {key: name for key, name in names.items() if key in example}
    truth = np.asarray(example["truth"], dtype=float)
    low, high = float(truth.min()), float(truth.max())
    span = high - low or 1.0
    errors = {key: np.asarray(example[key], dtype=float) - truth for key in names}
    # Limit the colour scale, so that an outlying prediction does not wash out the errors of the others.
    finite = [float(np.abs(error[np.isfinite(error)]).max(initial=0.0)) for error in errors.values()]
    largest = min(max(finite, default=0.0), span) or 1.0
    columns = 1 + len(names)
    figure, grid = style.panels(2 * columns, columns, 10.2 / columns, title=title, images=True)
    look = {"origin": "lower", "interpolation": "nearest"}
    fields = {"truth": truth, **{name: example[key] for key, name in names.items()}}
    for axes, (name, field) in zip(grid[:columns], fields.items(), strict=True):
        image = axes.imshow(field, cmap="viridis", vmin=low, vmax=low + span, **look)
        axes.set_title(name, fontsize=style.TITLE)
    style.colour_bar(figure, image, grid[:columns], "field", fraction=0.025, pad=0.02)
    grid[columns].set_visible(False)
    for axes, error in zip(grid[columns + 1 :], errors.values(), strict=True):
        image = axes.imshow(error, cmap="RdBu_r", vmin=-largest, vmax=largest, **look)
        size = float(np.linalg.norm(error) / np.linalg.norm(truth)) if truth.any() else np.inf
        axes.set_title(f"error: nRMSE {size:#.3g}" if np.isfinite(size) else "blew up", fontsize=style.LABEL)
    if errors:
        style.colour_bar(figure, image, grid[columns:], "predicted - true", fraction=0.025, pad=0.02)
    for axes in grid:
        axes.set_xticks([])
        axes.set_yticks([])
    write_figures({path.stem: figure}, path.parent)
