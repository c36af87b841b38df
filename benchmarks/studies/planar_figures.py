"""Figures of the 2D solvers' validation."""

from __future__ import annotations

from pathlib import Path

import torch

from shodh_moe.base.files import atomic_file
from shodh_moe.report.style import TICK, label, legend, panels, plain_ticks, png

Lines = dict[str, tuple[list[float], list[float]]]  # a figure's curves: label -> x, y
PLACES = (-1.5, -1.0, 0.0, 1.0, 1.5)  # coordinates s at which fields are drawn


def draw(images: Path, time_lines: Lines, space_lines: Lines, dam_lines: Lines, profiles: dict, fields: dict) -> None:
    figure, axes = panels(3, 3, 3.6, title="Convergence of the 2D solvers")
    titles = (("time step / that in use", "Time step"), ("cells a side", "Grid"), ("cells", "Shallow water on a line"))
    for place, lines, (x_label, title) in zip(axes, (time_lines, space_lines, dam_lines), titles, strict=True):
        for index, (name, (x, y)) in enumerate(lines.items()):
            across = [value / x[0] for value in x] if lines is time_lines else x
            place.loglog(across, y, "o-" if index % 2 else "s--", label=name, markersize=4)
        label(place, title, x_label, "relative error")
        plain_ticks(place.xaxis)
        place.set_xticks(sorted({x for line in place.get_lines() for x in line.get_xdata()}))
    axes[2].legend(fontsize=7.5, loc="lower left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=TICK)
    save(figure, images / "planar_convergence.png")
    figure, axes = panels(3, 3, 3.0, title="Dam breaks on a line, 100 cells, t = 1.5")
    for place, (name, (x, found, expected)) in zip(axes, profiles.items(), strict=True):
        place.plot(x, expected, "k-", label="exact", linewidth=1.2)
        place.plot(x, found, "o", color="#c2410c", markersize=2.5, label="computed")
        label(place, f"depth {name}", "x", "depth")
        legend(place)
    save(figure, images / "planar_dam_breaks.png")
    figure, axes = panels(len(fields) * len(PLACES), len(PLACES), 2.0, images=True)
    for row, (title, images_of) in enumerate(fields.items()):
        limit = [float(torch.stack(images_of).min()), float(torch.stack(images_of).max())]
        for column, field in enumerate(images_of):
            place = axes[row * len(PLACES) + column]
            place.imshow(field, origin="lower", cmap="RdBu_r", vmin=limit[0], vmax=limit[1])
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(f"s = {PLACES[column]:g}", fontsize=9)
            if column == 0:
                place.set_ylabel(title.replace(", ", "\n"), fontsize=8)
    save(figure, images / "planar_regimes.png")


def save(figure: object, path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(figure))  # type: ignore[arg-type]
