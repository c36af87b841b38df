"""What the page of a run in training draws: charts of its records, as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from shodh_moe.base.records import Record, read_run, records
from shodh_moe.report import style
from shodh_moe.report.run.curves import TRAIN_TERMS
from shodh_moe.report.run.routing import evenly

MOST_POINTS = 400  # of a line
MOST_LAYERS, MOST_EXPERTS = 4, 8
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def charts_of(run: Path) -> dict[str, Any]:
    """Return the last step and the charts of a run: losses, learning rate, speed, and the share of each expert.

    Raises:
        UserError: the records are damaged.
    """
    history = read_run(run)
    train, valid = records(history, "train"), records(history, "valid")
    charts = [
        _chart("Training loss", [_line(train, key, name, look) for key, (name, look) in TRAIN_TERMS.items()], log=True),
        _chart("Held-out latent MSE", _by_domain(valid), log=True),
        _chart("Learning rate", [_line(train, "learning_rate", "learning rate", "#1d4ed8")]),
        _chart("Tokens per second, all ranks", [_line(train, "tokens_per_second", "tokens per second", "#0f766e")]),
        *_routing(train),
    ]
    return {"step": max((record["step"] for record in history), default=0), "charts": [c for c in charts if c["lines"]]}


def _by_domain(valid: list[Record]) -> list[dict[str, Any]]:
    lines = []
    for index, domain in enumerate(valid[-1].get("latent_mse") or {} if valid else {}):
        colour, name = style.domain_colour(index), style.words(domain)
        for key, what, dash in (("latent_mse", name, ""), ("latent_mse_persistence", f"{name}, persistence", "3 4")):
            flat = [{"step": record["step"], key: (record.get(key) or {}).get(domain)} for record in valid]
            lines.append(_line(flat, key, what, colour, dash))
    return lines


def _routing(train: list[Record]) -> list[dict[str, Any]]:
    """One chart a layer, of the share of each domain's tokens by expert."""
    routed = [record for record in train if record.get("routing")]
    charts = []
    for layer in evenly(len(routed[-1]["routing"]) if routed else 0, MOST_LAYERS):
        has_layer = [record for record in routed if layer < len(record["routing"])]
        rows = [(record["step"], record["routing"][layer]["load"]) for record in has_layer]
        lines = []
        for index, (domain, last) in enumerate(rows[-1][1].items()):
            for expert in range(min(len(last), MOST_EXPERTS)):
                flat = [{"step": step, "share": load[domain][expert]} for step, load in rows if domain in load]
                colour = to_hex(style.expert_colour(expert, len(last)))
                name = f"{style.words(domain)}, expert {expert}"
                lines.append(_line(flat, "share", name, colour, DASHES[index % len(DASHES)]))
        charts.append(_chart(f"Share of tokens by expert, layer {layer}", lines, low=0.0, high=1.0))
    return charts


def _chart(title: str, lines: Iterable[dict[str, Any]], **look: Any) -> dict[str, Any]:
    return {"title": title, "lines": [line for line in lines if line["points"]], **look}


def _line(history: list[Record], key: str, name: str, colour: str, dash: str = "") -> dict[str, Any]:
    points = [(record["step"], record[key]) for record in history if record.get(key) is not None]
    stride = -(-len(points) // MOST_POINTS) or 1
    # Counted from the end, so that the newest point is always shown.
    return {"name": name, "colour": colour, "dash": dash, "points": points[::-1][::stride][::-1]}
