"""Figures of flow fields: slices, energy spectra, rollout error."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shodh_moe.report import style
from shodh_moe.report.run.load import Array, RunData

SPEED_UNIT = "cells / time step"
# Domains cut vertically along the stream (x to the right, z up); all others are cut horizontally.
UPRIGHT = {"open_channel", "porous_bed"}


def mid_slice(domain: str, volume: Array) -> tuple[Array, str, str]:
    """Return the middle plane of [..., X, Y, Z], rows upwards and columns to the right, and the names of its axes."""
    if domain in UPRIGHT:
        return np.swapaxes(volume[..., :, volume.shape[-2] // 2, :], -1, -2), "x", "z"
    return np.swapaxes(volume[..., volume.shape[-1] // 2], -1, -2), "x", "y"


def cut_name(domain: str) -> str:
    """Name the plane that `mid_slice` returns."""
    return "x-z, half way across" if domain in UPRIGHT else "x-y, half way up"


def field_slices(run: RunData, domain: str) -> Figure | None:
    """Draw true, predicted and error (predicted - true) speed and pressure in the mid-plane of one example."""
    arrays = run.get(domain, "true", "pred", "solid")
    if arrays is None:
        return None
    true, pred, solid = (mid_slice(domain, volume)[0] for volume in arrays)
    _, across, up = mid_slice(domain, arrays[2])
    quantities = [
        (
            "speed",
            f"speed\n({SPEED_UNIT})",
            np.linalg.norm(true[:3], axis=0),
            np.linalg.norm(pred[:3], axis=0),
            "viridis",
        ),
        ("pressure", "pressure\n(lattice units)", true[3], pred[3], "cividis"),
    ]
    aspect = solid.shape[0] / solid.shape[1]
    height = min(max(2.9 * aspect, 1.9), 5.0) + 0.75
    title = f"{style.words(domain)}: one step ahead, mid-plane {cut_name(domain)}"
    figure, grid = style.panels(6, 3, height, title=title, images=True)
    for row, (name, unit, true_value, pred_value, colours) in enumerate(quantities):
        shown = [np.where(solid > 0.5, np.nan, value) for value in (true_value, pred_value, pred_value - true_value)]
        low, high = _limits(np.stack(shown[:2]))
        largest = _largest(shown[2])
        places = grid[3 * row : 3 * row + 3]
        for axes, picture, what in zip(places, shown, ("true", "predicted", "error"), strict=True):
            error = what == "error"
            axes.patch.set(facecolor="0.88", edgecolor="0.6", hatch="////", linewidth=0.0)
            image = axes.imshow(
                picture,
                origin="lower",
                interpolation="nearest",
                cmap="RdBu_r" if error else colours,
                vmin=-largest if error else low,
                vmax=largest if error else high,
            )
            style.label(axes, f"{name}: {what}", f"{across} (cells)", f"{up} (cells)", grid=False)
            if what != "true":
                over = [axes] if error else places[:2]
                shown_unit, share = (f"error of {unit}", 0.05) if error else (unit, 0.025)
                bar = style.colour_bar(figure, image, over, shown_unit, fraction=share, pad=0.02)
                bar.formatter.set_powerlimits((-3, 4))
                bar.ax.yaxis.get_offset_text().set_fontsize(style.TICK)
    return figure


def _limits(values: Array) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _largest(values: Array) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def energy_spectra(run: RunData) -> Figure | None:
    """Draw kinetic energy against wave number on logarithmic axes, one panel per domain."""
    found = [
        (d, a) for d in run.domains if (a := run.get(d, "spectrum_k", "spectrum_true", "spectrum_pred")) is not None
    ]
    if not found:
        return None
    figure, grid = style.panels(len(found), 2, 3.9, title="Energy spectrum of the velocity")
    for axes, (domain, (k, true, pred)) in zip(grid, found, strict=True):
        lines = [(true, "true", style.TRUE_STYLE), (pred, "predicted, one step", style.PRED_STYLE)]
        reconstruction = run.get(domain, "spectrum_reconstruction")
        if reconstruction is not None:
            lines.append((reconstruction[0], "tokenizer alone", style.RECONSTRUCTION_STYLE))
        for energy, name, look in lines:
            shown = (k > 0) & (energy > 0)
            axes.plot(k[shown], energy[shown], label=name, **look)
        axes.set_xscale("log")
        style.plain_ticks(axes.xaxis)
        style.log_y(axes)
        # The decoder cannot produce the corner modes: their rounding error would stretch the axis.
        axes.set_ylim(bottom=true[k > 0].max() * 1e-8)
        axes.axvline(np.pi, color="0.6", linewidth=1.0)
        axes.annotate(
            "Nyquist",
            (np.pi, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 2),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=style.TICK,
            color="0.4",
        )
        style.label(axes, style.words(domain), "wave number k (radians / cell)", f"energy in shell  (({SPEED_UNIT})²)")
        style.legend(axes, loc="lower left")
    return figure


def rollout_error(run: RunData) -> Figure | None:
    """Draw the velocity error of a rollout and of persistence against time, one panel per domain."""
    found = [(d, a) for d in run.domains if (a := run.get(d, "rollout_time", "rollout_error")) is not None]
    if not found:
        return None
    figure, grid = style.panels(len(found), 2, 3.7, title="Error of a rollout")
    for axes, (domain, (time, error)) in zip(grid, found, strict=True):
        _rollout_panel(run, domain, axes, time, error)
        style.label(
            axes, style.words(domain), "time since the last seen snapshot (snapshots)", "velocity nRMSE (no unit)"
        )
        axes.set_ylim(bottom=0.0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        style.legend(axes, loc="best")
    return figure


def _rollout_panel(run: RunData, domain: str, axes: Axes, time: Array, error: Array) -> None:
    # A single measured time is a point, not a line: without a marker the panel looks empty.
    mark = "o" if time.size <= 30 else ""
    axes.plot(time, error, label="model, own predictions fed back", marker=mark, markersize=4, **style.PRED_STYLE)
    band = run.get(domain, "rollout_error_low", "rollout_error_high")
    if band is not None:
        axes.fill_between(
            time, *band, color=style.PRED_STYLE["color"], alpha=0.18, linewidth=0, label="spread over trajectories"
        )
    persistence = run.get(domain, "rollout_error_persistence")
    if persistence is not None:
        axes.plot(
            time,
            persistence[0],
            label="persistence (nothing changes)",
            marker=mark,
            markersize=3,
            **style.BASELINE_STYLE,
        )
