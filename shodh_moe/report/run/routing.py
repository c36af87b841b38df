"""Figures of the routers: load per layer, where in space each expert works, load over training."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from shodh_moe.base.records import Record, records
from shodh_moe.report import style
from shodh_moe.report.run.fields import cut_name, mid_slice
from shodh_moe.report.run.load import RunData

MOST_LAYERS = 9  # panels of more layers would be too small to read; evenly spaced layers are shown
MOST_NAMED_EXPERTS = 4


def expert_load(run: RunData) -> Figure | None:
    """Draw the share of each domain's held-out tokens per expert: one stacked bar per layer, one panel per domain."""
    layers = [layer for layer in run.metrics.get("routing", {}).get("layers", []) if layer.get("load")]
    domains = [domain for domain in run.domains if any(domain in layer["load"] for layer in layers)]
    if not domains:
        return None
    experts = max(len(load) for layer in layers for load in layer["load"].values())
    figure, grid = style.panels(len(domains), 2, 3.4, title="Expert load on held-out data")
    for axes, domain in zip(grid, domains, strict=True):
        here = [layer for layer in layers if domain in layer["load"]]
        loads = np.array([layer["load"][domain] for layer in here], dtype=float)
        base = np.zeros(len(here))
        for expert in range(experts):
            axes.bar(range(len(here)), loads[:, expert], 0.72, base, color=style.expert_colour(expert, experts))
            base += loads[:, expert]
        axes.set_xticks(range(len(here)), [str(layer.get("layer", i)) for i, layer in enumerate(here)])
        axes.set_ylim(0, 1)
        style.label(axes, style.words(domain), "layer", "share of tokens")
    _expert_key(figure, grid, experts)
    return figure


def _expert_key(figure: Figure, grid: list[Axes], experts: int) -> None:
    """Show which colour is which expert: a legend for up to 10 experts, a colour bar for more."""
    if experts <= 10:
        patches = [Patch(color=style.expert_colour(e, experts), label=f"expert {e}") for e in range(experts)]
        style.legend_below(figure, patches, min(experts, 8))
        return
    colours, norm = style.expert_colours(experts)
    ticks = range(0, experts, max(1, experts // 8))
    style.colour_bar(figure, ScalarMappable(norm, colours), grid, "expert", ticks=ticks, pad=0.02)


def routing_map(run: RunData, domain: str) -> Figure | None:
    """Draw the expert of every token in the mid-plane, one panel per layer, beside the tokens' solid fraction."""
    arrays = run.get(domain, "expert_map")
    if arrays is None:
        return None
    expert_map = arrays[0].astype(int)
    chosen = evenly(len(expert_map), MOST_LAYERS)
    loads = [
        load for layer in run.metrics.get("routing", {}).get("layers", []) for load in layer.get("load", {}).values()
    ]
    experts = max([int(expert_map.max()) + 1, 1, *map(len, loads)])
    solid = run.get(domain, "solid_fraction")
    first = 0 if solid is None else 1
    aspect_picture, across, up = mid_slice(domain, expert_map[0])
    aspect = aspect_picture.shape[0] / aspect_picture.shape[1]
    title = f"{style.words(domain)}: who processes which token, mid-plane {cut_name(domain)}"
    count = first + len(chosen)
    columns = count if count <= 5 else 5
    figure, grid = style.panels(
        count, columns, min(max(8.6 / columns * aspect, 1.2), 3.6) + 1.0, title=title, images=True
    )
    if solid is not None:
        image = grid[0].imshow(mid_slice(domain, solid[0])[0], origin="lower", cmap="Greys", vmin=0, vmax=1)
        style.label(grid[0], "solid fraction", f"{across} (tokens)", f"{up} (tokens)", grid=False)
        style.colour_bar(figure, image, grid[0], location="bottom", fraction=0.06, pad=0.02, ticks=(0, 0.5, 1))
    colours, norm = style.expert_colours(experts)
    for axes, layer in zip(grid[first:], chosen, strict=True):
        picture = np.ma.masked_less(mid_slice(domain, expert_map[layer])[0], 0)
        axes.imshow(picture, origin="lower", cmap=colours, norm=norm, interpolation="nearest")
        style.label(axes, f"layer {layer}", f"{across} (tokens)", f"{up} (tokens)", grid=False)
    for axes in grid:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _expert_key(figure, grid, experts)
    return figure


def evenly(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the indices 0 .. count - 1, evenly spaced, both ends included."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()}) if count else []


def load_over_steps(run: RunData) -> Figure | None:
    """Draw the share per expert (top) and the dropped share (bottom) over training, one column per layer."""
    steps = [record for record in records(run.history, "train") if record.get("routing")]
    if not steps:
        return None
    layers = evenly(max(len(record["routing"]) for record in steps), 4)
    figure, grid = style.panels(2 * len(layers), len(layers), 2.9, title="Routing during training")
    domains = list(steps[-1]["routing"][0].get("load", {})) or run.domains
    experts = max(
        (len(load) for record in steps for layer in record["routing"] for load in layer.get("load", {}).values()),
        default=0,
    )
    for column, layer in enumerate(layers):
        series = [(record["step"], record["routing"][layer]) for record in steps if layer < len(record["routing"])]
        top, bottom = grid[column], grid[column + len(layers)]
        for index, domain in enumerate(domains):
            _load_lines(top, series, domain, index, experts)
            dropped = [
                (step, entry["dropped_fraction"][domain])
                for step, entry in series
                if domain in entry.get("dropped_fraction", {})
            ]
            if dropped:
                bottom.plot(
                    *zip(*dropped, strict=True),
                    color=style.domain_colour(index),
                    linestyle=style.LINESTYLES[index % len(style.LINESTYLES)],
                    label=f"{style.words(domain)}, dropped",
                    linewidth=1.8,
                )
        name = "share of tokens" if experts <= MOST_NAMED_EXPERTS else "share at busiest expert"
        style.label(top, f"layer {layer}", "", name if column == 0 else "")
        style.label(bottom, "", "step", "dropped share" if column == 0 else "")
        top.set_ylim(-0.03, 1.03)
        bottom.set_ylim(0, max(bottom.get_ylim()[1], 0.01))
    handles = [handle for axes in (grid[0], grid[len(layers)]) for handle in axes.get_legend_handles_labels()[0]]
    style.legend_below(figure, handles, min(len(handles), 4))
    return figure


def _load_lines(axes: Axes, series: list[tuple[int, Record]], domain: str, index: int, experts: int) -> None:
    """Draw a line per expert, with dashes by domain; with many experts only the busiest one, coloured by domain."""
    found = [(step, entry["load"][domain]) for step, entry in series if domain in entry.get("load", {})]
    if not found:
        return
    steps, loads = [step for step, _ in found], np.array([load for _, load in found], dtype=float)
    dashes, name = style.LINESTYLES[index % len(style.LINESTYLES)], style.words(domain)
    if experts > MOST_NAMED_EXPERTS:
        colour = style.domain_colour(index)
        axes.plot(steps, loads.max(1), color=colour, linestyle=dashes, label=f"{name}, busiest", linewidth=1.8)
        return
    for expert in range(loads.shape[1]):
        shade = style.expert_colour(expert, experts)
        axes.plot(
            steps, loads[:, expert], color=shade, linestyle=dashes, label=f"{name}, expert {expert}", linewidth=1.8
        )
