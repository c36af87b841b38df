"""Figures of lattice_validation.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shodh_moe.report.style import DOMAIN_COLOURS as COLOURS
from shodh_moe.report.style import label, legend, panels, plain_ticks
from shodh_moe.solvers import exact
from studies.lattice_flows import SHARES, Array, Case, heights, published, startup, swinging_film

MARKS = "osD^vP"
LINE: dict[str, Any] = {"markersize": 4, "linewidth": 1.2}


def profiles(walls: dict[str, tuple[Array, Array]]) -> Figure:
    """Plot computed points over exact lines. ``walls`` holds profiles of the steady channel; the rest runs here."""
    figure, axes = panels(3, 3, 3.4)
    height = np.linspace(0, 1, 101)
    axes[0].plot(4 * height * (1 - height), height, "k-", linewidth=1.2, label="exact")
    for index, (name, (found, _)) in enumerate(walls.items()):
        top = 0.02  # largest exact velocity
        axes[0].plot(found / top, heights(8) / 8, MARKS[index], color=COLOURS[index], markersize=5, label=name)
    label(axes[0], "Poiseuille, 8 cells, viscosity 0.5", "velocity / exact maximum", "z / gap")
    axes[0].set_xlim(-0.05, 1.3)
    found, expected = startup(16, 0.1)
    for index, share in enumerate(SHARES):
        scale = 0.02 * 4 / 16
        axes[1].plot(expected[index] / scale, heights(16) / 16, "k-", linewidth=1.2)
        axes[1].plot(
            found[index] / scale, heights(16) / 16, "o", color=COLOURS[index], markersize=4, label=f"{share:g}"
        )
    label(axes[1], "Start-up, 16 cells", "velocity / steady maximum", "z / gap")
    axes[1].set_xlim(0, 1.45)
    axes[1].legend(fontsize=8, loc="center right", title=r"$\nu t/\mathrm{gap}^2$", title_fontsize=9)
    found, expected = swinging_film(16, 0.1, 4.0)
    for index in range(0, 8, 2):
        scale = float(np.abs(expected).max())
        axes[2].plot(expected[index] / scale, heights(16) / 16, "k-", linewidth=1.2)
        name = f"{index + 1}/8"
        axes[2].plot(found[index] / scale, heights(16) / 16, "o", color=COLOURS[index // 2], markersize=4, label=name)
    label(axes[2], "Swinging film, 16 cells, Wo = 4", "velocity / largest", "z / depth")
    axes[2].legend(fontsize=8, loc="upper center", title="of a period", title_fontsize=9)
    axes[0].legend(fontsize=9, loc="center left")
    return figure


def convergence(groups: dict[str, list[Case]], mach: Case) -> Figure:
    """Plot errors over the number of cells, one panel per group, and over the Mach number."""
    figure, axes = panels(4, 2, 3.8)
    for place, (title, cases) in zip(axes, groups.items(), strict=False):
        for index, case in enumerate(cases):
            style: dict[str, Any] = LINE | {"color": COLOURS[index], "label": case.name}
            if case.spread:
                place.errorbar(case.sizes, case.errors, case.spread, fmt=MARKS[index] + "-", capsize=3, **style)
            else:
                place.plot(case.sizes, case.errors, MARKS[index] + "-", **style)
        order = 1 if "Spheres" in title else 2
        sizes = sorted({size for case in cases for size in case.sizes})
        start = min(case.errors[-1] * case.sizes[-1] ** order for case in cases) / sizes[0] ** order
        ends = np.array([sizes[0], sizes[-1]])
        place.plot(ends, 0.5 * start * (ends[0] / ends) ** order, "k:", linewidth=1.2, label=f"order {order}")
        place.set_xscale("log")
        place.set_yscale("log")
        label(place, title, "cells", "relative error")
        plain_ticks(place.xaxis)
        place.set_xticks(sizes)
        low, high = place.get_ylim()
        place.set_ylim(low / (high / low) ** 0.5, high)  # leaves room for the names
        place.legend(fontsize=8, loc="lower left")
    axes[-1].loglog(mach.mach, mach.errors, "o-", color=COLOURS[0], label=mach.name, **LINE)
    reach = np.array(mach.mach[1:])
    axes[-1].loglog(reach, 0.6 * mach.errors[-1] * (reach / reach[-1]) ** 2, "k:", linewidth=1.2, label="order 2")
    label(axes[-1], "Mach number", "Ma", "relative error")
    plain_ticks(axes[-1].xaxis)
    axes[-1].legend(fontsize=8)
    return figure


def spheres(
    found: dict[int, list[float]], by_viscosity: dict[str, tuple[list[float], list[float]]], plane: Array
) -> Figure:
    """Plot drag over solid fraction and viscosity, and the velocity in the middle plane."""
    figure, axes = panels(3, 3, 3.6)
    fractions, known = list(exact.ZICK_HOMSY), list(exact.ZICK_HOMSY.values())
    reference, fine = published(), np.linspace(0.02, 0.5236, 100)
    axes[0].semilogy(fine, [reference(fraction) for fraction in fine], "k-", linewidth=1)
    axes[0].semilogy(fractions, known, "k_", markersize=13, label="Zick and Homsy")
    for index, n in enumerate((16, 32, 64)):
        axes[0].semilogy(
            fractions, found[n], MARKS[index], color=COLOURS[index], markersize=4.5, label=f"${n}^3$ cells"
        )
    label(axes[0], "Drag of a simple cubic array", "solid fraction", "K")
    plain_ticks(axes[0].yaxis)
    legend(axes[0])
    for index, (name, (viscosity, drags)) in enumerate(by_viscosity.items()):
        axes[1].semilogx(viscosity, drags, MARKS[index] + "-", color=COLOURS[index], markersize=5, label=name)
    axes[1].axhline(exact.ZICK_HOMSY[0.216], color="black", linewidth=1, label="Zick and Homsy")
    label(axes[1], "Solid fraction 0.216, $24^3$ cells", "viscosity", "K")
    axes[1].set_ylim(0, None)
    legend(axes[1], loc="lower left")
    shown = np.tile(plane / np.nan_to_num(plane).mean(), (2, 2)).T
    image = axes[2].imshow(shown, origin="lower", cmap="viridis", extent=(0, 2, 0, 2))
    axes[2].set_facecolor("0.8")
    label(axes[2], "Velocity, middle plane, 0.216", "x / side", "z / side", grid=False)
    axes[2].set_xticks([0, 1, 2])
    axes[2].set_yticks([0, 1, 2])
    figure.colorbar(image, ax=axes[2], shrink=0.85, label="over its mean")
    return figure
