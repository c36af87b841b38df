"""Figures of the audit: errors of the arms, load and gradients over training, swapped experts, relearning, routing.

Seeds that diverged have no value to plot; they are named beside their arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from shodh_moe.audit.findings import gradient_group, gradient_means
from shodh_moe.audit.results import Run, by_arm, finished
from shodh_moe.audit.tables import SET_TITLES, arm_words
from shodh_moe.audit.verdict import MARGIN
from shodh_moe.report import style
from shodh_moe.report.figure import write_figures
from shodh_moe.report.run import routing
from shodh_moe.report.run.load import Array, RunData

Summary = dict[str, Any]
Maps = Mapping[str, Mapping[str, Array]]

ARM_COLOURS = {"moe": "#c2410c", "dense_active": "#1d4ed8", "dense_total": "#0d9488", "oracle": "#f59e0b"}
OTHER = "#64748b"
GROUP_COLOURS = {
    "attention": "#1d4ed8",
    "shared": "#0d9488",
    "experts": "#c2410c",
    "paths": "#f59e0b",
    "router": "#7c3aed",
    "rest": "#64748b",
}
LOST = "#b91c1c"
FAR = 200  # percent; an axis that reaches further is symmetric logarithmic
TICKS = (-1000, -300, -100, -50, -20, -10, 0, 10, 20, 50, 100, 300, 1000)  # of a symmetric logarithmic axis


def draw(results: list[Run], summary: Summary, folder: Path, maps: Maps | None = None) -> list[Path]:
    """Draw every figure that has data and return the paths. For a figure without data, an existing file is removed.

    Args:
        results: the result files; see `shodh_moe.audit.summary.summarise`.
        summary: what `summarise` returns for them.
        folder: where to write the figures; created if missing.
        maps: arrays of one run of the mixture by domain and name; see `shodh_moe.audit.measure.routing_maps`.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = {name: [row for row in summary["transfer"] if row["set"] == name] for name in SET_TITLES}
    pictures = {
        f"transfer_{name}": _relative(here, f"{SET_TITLES[name]}: joint training against one domain alone")
        for name, here in rows.items()
    }
    four = [row for row in summary["pairs"] if row["set"] == "four"]
    pictures |= {
        "four": _relative(four, "Mixture against dense joint training, same active"),
        "load": _load(results),
        "gradients": _gradients(results),
        "swap": _swap(summary["swap"]),
        "kinship": _kinship(summary["kinship"]),
        "relearning": _relearning(results),
    }
    for domain, one in (maps or {}).items():
        pictures[f"routing_map_{domain}"] = _routing_map(domain, one)
    return write_figures(pictures, folder)


def _colour(arm: str) -> str:
    return ARM_COLOURS.get("moe" if arm.startswith("moe") else arm, OTHER)


def _relative(rows: list[dict[str, Any]], title: str) -> Figure | None:
    """Draw relative differences of the latent MSE: mean, interval and seeds, one panel per domain."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    if not domains:
        return None
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, grid = style.panels(len(domains), 2, 1.3 + 0.42 * len(arms), title=title)
    for number, (axes, domain) in enumerate(zip(grid, domains, strict=True)):
        axes.axvspan(0, 100 * MARGIN, color="0.9", linewidth=0)
        axes.axvline(0, color="black", linewidth=1.2)
        for row in rows:
            if row["domain"] == domain:
                _point(axes, arms.index(row["arm"]), row["latent_mse"], _colour(row["arm"]))
        axes.set_yticks(range(len(arms)), [arm_words(arm) if number % 2 == 0 else "" for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        style.label(axes, style.words(domain), "latent MSE, difference in %" if number >= len(domains) - 2 else "", "")
        axes.grid(False, axis="y")
    low, high = min(axes.get_xlim()[0] for axes in grid), max(axes.get_xlim()[1] for axes in grid)
    for axes in grid:
        if high > FAR:  # an outlying arm must not squeeze the others
            axes.set_xscale("symlog", linthresh=20, linscale=1.5)
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.set_xticks([], minor=True)
        axes.set_xlim(low, high + 0.04 * (high - low))
    marks = [
        Line2D([], [], color="0.3", marker="D", linewidth=2.2, label="mean, 95 % interval over seeds"),
        Line2D([], [], color="0.3", marker="o", linestyle="", markersize=4, alpha=0.6, label="one seed"),
        Line2D([], [], color="0.85", linewidth=8, label=f"margin of {MARGIN:.0%}"),
        Line2D([], [], color=LOST, marker="x", linestyle="", markeredgewidth=2, label="seeds that diverged"),
    ]
    style.legend_below(figure, marks, 4)
    return figure


def _lost(seeds: Iterable[int | str]) -> str:
    """Format as ``seeds 1, 3 diverged``."""
    named = [str(seed) for seed in seeds]
    return f"seed{'s' if len(named) > 1 else ''} {', '.join(named)} diverged" if named else ""


def _point(axes: Axes, height: int, one: dict[str, Any], colour: str) -> None:
    seeds = [100 * value for value in one["by_seed"].values()]
    axes.plot(seeds, [height] * len(seeds), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
    if one["value"] is not None:
        axes.plot(100 * one["value"], height, "D", color=colour, markersize=6.5)
    if one["low"] is not None:
        axes.plot([100 * one["low"], 100 * one["high"]], [height] * 2, color=colour, linewidth=2.2)
    if one["diverged"]:
        # The cross is at the right edge, whatever the scale of the axis.
        across = axes.get_yaxis_transform()
        axes.plot(0.98, height, "x", color=LOST, markersize=8, markeredgewidth=2, transform=across, clip_on=False)
        look = {"color": LOST, "fontsize": style.TICK - 0.5, "ha": "right"}
        axes.text(0.96, height - 0.3, _lost(one["diverged"]), transform=across, va="center", **look)


def _load(results: list[Run]) -> Figure | None:
    """Draw, over training, each domain's share of tokens at the expert that finally serves the first domain."""
    every = by_arm(results).get("main", {}).get("moe", {})
    seeds = {s: run for s, run in finished(every).items() if (run.get("bifurcation") or {}).get("loads")}
    if not seeds:
        return None
    example = next(iter(seeds.values()))
    domains = example["domains"]
    layers = routing.evenly(len(example["bifurcation"]["loads"][-1]["load"]), routing.MOST_LAYERS)
    columns = min(len(layers), 3 if len(layers) > 4 else 2)
    title = f"Mixture: share of tokens at the expert that serves {style.words(domains[0])} in the end"
    figure, grid = style.panels(len(layers), columns, 2.8, title=title)
    for axes, layer in zip(grid, layers, strict=True):
        for run in seeds.values():
            records = run["bifurcation"]["loads"]
            expert = int(np.argmax(records[-1]["load"][layer][domains[0]]))
            for number, domain in enumerate(domains):
                shares = [record["load"][layer][domain][expert] for record in records]
                look = {"color": style.domain_colour(number), "linestyle": style.LINESTYLES[number]}
                axes.plot([record["step"] for record in records], shares, linewidth=1.1, alpha=0.85, **look)
            if run["bifurcation"]["step"] is not None:
                axes.axvline(run["bifurcation"]["step"], ymax=0.06, color="black", linewidth=1.4)
        axes.set_ylim(-0.03, 1.03)
        style.label(axes, f"layer {layer}", "step", "share of tokens")
    marks = [
        Line2D([], [], color=style.domain_colour(i), linestyle=style.LINESTYLES[i], label=style.words(domain))
        for i, domain in enumerate(domains)
    ]
    marks.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=9, label="bifurcated from here on"))
    if lost := _lost(seed for seed, run in every.items() if run["diverged"]):
        marks.append(Line2D([], [], color=LOST, marker="x", linestyle="", label=lost))
    style.legend_below(figure, marks, len(marks))
    return figure


def _gradients(results: list[Run]) -> Figure | None:
    """Draw cosines of gradients by group, means over seeds: between domains and, dotted, within one domain."""
    arms = by_arm(results).get("main", {})
    shown = {}
    for arm in ("moe", "dense_active"):
        recorded = [run["gradients"] for run in arms.get(arm, {}).values() if run.get("gradients")]
        if recorded or (arm in arms and not finished(arms[arm])):  # an arm that diverged keeps its panel
            shown[arm] = recorded
    if not any(shown.values()):
        return None
    figure, grid = style.panels(len(shown), 2, 4.2, title="Cosine between gradients of the domains")
    groups: dict[str, None] = {}
    for axes, (arm, recorded) in zip(grid, shown.items(), strict=True):
        here = dict.fromkeys(
            gradient_group(name) for records in recorded for record in records for name in record["groups"]
        )
        groups |= here
        for group in here:
            for kind, look in (("cosine", {"linewidth": 2.0}), ("within", {"linewidth": 1.2, "linestyle": ":"})):
                steps, means = _over_steps(recorded, kind, group)
                axes.plot(steps, means, color=GROUP_COLOURS.get(group, OTHER), **look)
        axes.axhline(0, color="black", linewidth=1.0)
        lost = _lost(seed for seed, run in arms[arm].items() if run["diverged"])
        style.label(
            axes, f"{arm_words(arm)} ({lost})" if lost else arm_words(arm), "step", "cosine" if axes is grid[0] else ""
        )
    low = min(axes.get_ylim()[0] for axes in grid)
    for axes in grid:
        axes.set_ylim(min(low, -0.1), 1.05)
    marks = [Line2D([], [], color=GROUP_COLOURS.get(g, OTHER), linewidth=2.0, label=g) for g in groups]
    marks.append(Line2D([], [], color="0.3", linewidth=2.0, label="between domains"))
    marks.append(Line2D([], [], color="0.3", linewidth=1.2, linestyle=":", label="within one domain"))
    style.legend_below(figure, marks, len(marks))
    return figure


def _over_steps(recorded: list[list[dict[str, Any]]], kind: str, group: str) -> tuple[list[int], list[float]]:
    """Steps, and means over seeds at each step; NaN, which is not drawn, where no seed has a cosine."""
    values: dict[int, list[float]] = {}
    for records in recorded:
        for record in records:
            values.setdefault(record["step"], []).append(gradient_means(record, kind).get(group, np.nan))
    steps = sorted(values)
    known = [[value for value in values[step] if np.isfinite(value)] for step in steps]
    return steps, [float(np.mean(found)) if found else np.nan for found in known]


def _swap(rows: list[dict[str, Any]]) -> Figure | None:
    """Draw the growth of the main domains' errors with swapped experts, for each layer and for all layers."""
    here = [row for row in rows if row["set"] == "main" and row["all"]["value"] is not None]
    domains = list(dict.fromkeys(row["domain"] for row in here))
    if not domains:
        return None
    arms = list(dict.fromkeys(row["arm"] for row in here))
    figure, grid = style.panels(len(domains), 1, 3.0, title="Error with swapped experts over error without")
    for axes, domain in zip(grid, domains, strict=True):
        own = [row for row in here if row["domain"] == domain]
        layers = max(len(row["layers"]) for row in own)
        width = 0.84 / len(arms)
        for row in own:
            offset = (arms.index(row["arm"]) - (len(arms) - 1) / 2) * width
            for place, one in enumerate([*row["layers"], row["all"]]):
                if one["value"] is None:
                    continue
                # Bars start at 1 (no change): a logarithmic axis has no 0.
                axes.bar(place + offset, one["value"] - 1, 0.92 * width, 1, color=_colour(row["arm"]), alpha=0.75)
                seeds = list(one["by_seed"].values())
                axes.plot([place + offset] * len(seeds), seeds, ".", color="black", markersize=4)
        axes.axhline(1, color="black", linewidth=1.0)
        axes.set_xticks(range(layers + 1), [*(f"layer {layer}" for layer in range(layers)), "all layers"])
        style.label(axes, style.words(domain), "", "times as large")
        style.log_y(axes)
    lost = {arm: _lost({s for row in here if row["arm"] == arm for s in row["all"]["diverged"]}) for arm in arms}
    names = [f"{arm_words(arm)} ({lost[arm]})" if lost[arm] else arm_words(arm) for arm in arms]
    marks = [
        Line2D([], [], color=_colour(arm), linewidth=7, alpha=0.75, label=name)
        for arm, name in zip(arms, names, strict=True)
    ]
    style.legend_below(figure, [*marks, Line2D([], [], color="black", marker=".", linestyle="", label="one seed")], 4)
    return figure


def _kinship(rows: list[dict[str, Any]]) -> Figure | None:
    """Draw dendrograms of the domains, a panel for each seed, of the mixture with as many experts as domains."""
    here = [row for row in rows if row["arm"] == f"moe_{len(row['growth'])}"]
    if not here:
        return None
    figure, grid = style.panels(len(here), 3, 2.2, title="Kinship of domains: mixture with an expert for each")
    for axes, row in zip(grid, here, strict=True):
        names = [style.words(domain) for domain in row["growth"]]
        linkage = hierarchy.linkage(squareform(np.array(row["distances"])), "average")
        hierarchy.dendrogram(linkage, orientation="right", labels=names, ax=axes, color_threshold=0)
        style.label(axes, f"seed {row['seed']}", "mean ln(growth)", "")
        axes.grid(False)
    return figure


def _relearning(results: list[Run]) -> Figure | None:
    """Draw the validation error of the new domain over steps, from the checkpoint and from scratch."""
    arms = by_arm(results).get("main", {})
    found = [run["relearning"] for seeds in arms.values() for run in seeds.values() if run.get("relearning")]
    if not found:
        return None
    shown = {
        arm: seeds
        for arm, seeds in arms.items()
        if any(run.get("relearning") for run in seeds.values())
        or not (finished(seeds) or arm.startswith("single"))  # an arm that diverged keeps its panel
    }
    figure, grid = style.panels(len(shown), 3, 2.9, title=f"Learning {style.words(found[0]['domain'])} afterwards")
    looks = {"from_checkpoint": {"linestyle": "-"}, "from_scratch": {"linestyle": "--", "color": "0.45"}}
    for axes, (arm, seeds) in zip(grid, shown.items(), strict=True):
        for run in finished(seeds).values():
            for key, look in looks.items():
                if run.get("relearning"):
                    values = [np.nan if value is None else value for value in run["relearning"][key]]
                    axes.plot(run["relearning"]["steps"], values, **{"color": _colour(arm), "linewidth": 1.3} | look)
        if lost := _lost(seed for seed, run in seeds.items() if run["diverged"]):
            place = {"ha": "right", "va": "top", "transform": axes.transAxes}
            axes.text(0.97, 0.95, lost, color=LOST, fontsize=style.TICK, **place)
        if not axes.get_lines():
            axes.set_xticks([])
        number = list(shown).index(arm)
        style.label(axes, arm_words(arm), "step", "valid latent MSE" if number % 3 == 0 else "")
        style.log_y(axes)
    limits = [axes.get_ylim() for axes in grid if axes.get_lines()]
    for axes in grid:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    marks = [
        Line2D([], [], color="0.2", label="from the checkpoint, one seed"),
        Line2D([], [], color="0.45", linestyle="--", label="from scratch, one seed"),
    ]
    style.legend_below(figure, marks, 2)
    return figure


def _routing_map(domain: str, arrays: Mapping[str, Array]) -> Figure | None:
    """Draw the routing map of one domain as in the report of a run."""
    examples = {f"{domain}/{name}": np.asarray(arrays[name]) for name in ("expert_map", "solid_fraction")}
    run = RunData("", {}, [], [], examples, [domain], "", {})
    return routing.routing_map(run, domain)
