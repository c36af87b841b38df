"""Figures of training: losses of the transformer and of the tokenizer."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shodh_moe.base.records import Record, records
from shodh_moe.report import style
from shodh_moe.report.run.load import RunData

TRAIN_TERMS = {
    "loss": ("total", "black"),
    "prediction_loss": ("prediction", "#c2410c"),
    "balance_loss": ("balance", "#2563eb"),
    "z_loss": ("router z", "#16a34a"),
    "commitment_loss": ("commitment", "#9333ea"),
}
TOKENIZER_COLOURS = {"loss": "black", "velocity_mse": "#c2410c", "pressure_mse": "#2563eb"}


def loss_curves(run: RunData) -> Figure | None:
    """Draw losses over steps: the training terms, held-out latent error with persistence, the tokenizer's losses."""
    train, valid = records(run.history, "train"), records(run.history, "valid")
    tokenizer_train = records(run.tokenizer_history, "train")
    tokenizer_valid = records(run.tokenizer_history, "valid")
    count = bool(train) + bool(valid) + bool(tokenizer_train) + bool(tokenizer_valid)
    if not count:
        return None
    figure, grid = style.panels(count, 2, 4.2, title="Losses")
    panels = iter(grid)
    if train:
        axes = next(panels)
        for key, (name, colour) in TRAIN_TERMS.items():
            _line(axes, train, key, name, color=colour)
        _finish(axes, "transformer, training batches", "loss (no unit)")
    if valid:
        axes = next(panels)
        for index, domain in enumerate(run.domains):
            colour, name = style.domain_colour(index), style.words(domain)
            _domain_line(axes, valid, "latent_mse", domain, name, color=colour)
            _domain_line(
                axes, valid, "latent_mse_persistence", domain, f"{name}, persistence", color=colour, linestyle=":"
            )
        _finish(axes, "transformer, held-out data", "latent MSE (no unit)")
    if tokenizer_train:
        axes = next(panels)
        for key, colour in TOKENIZER_COLOURS.items():
            _line(axes, tokenizer_train, key, "total" if key == "loss" else key.replace("_mse", ""), color=colour)
        _finish(axes, "tokenizer, training batches", "MSE of normalised fields")
    if tokenizer_valid:
        axes = next(panels)
        for index, domain in enumerate(run.domains):
            for key, dash in (("velocity_mse", "-"), ("pressure_mse", "--")):
                name = f"{style.words(domain)}, {key.removesuffix('_mse')}"
                _domain_line(axes, tokenizer_valid, key, domain, name, color=style.domain_colour(index), linestyle=dash)
        _finish(axes, "tokenizer, held-out data", "MSE of normalised fields")
    return figure


def _line(axes: Axes, history: list[Record], key: str, name: str, **look: str) -> None:
    points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, label=name, linewidth=1.6, marker="o" if len(points) <= 12 else "", markersize=4, **look
        )


def _domain_line(axes: Axes, history: list[Record], key: str, domain: str, name: str, **look: str) -> None:
    flat = [{"step": record["step"], key: (record.get(key) or {}).get(domain)} for record in history]
    _line(axes, flat, key, name, **look)


def _finish(axes: Axes, title: str, y: str) -> None:
    style.log_y(axes)
    style.label(axes, title, "step", y)
    style.legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
