"""Make tables and figures of docs/validation.md, section "3D lattice Boltzmann" (minutes on one core).

    python benchmarks/studies/lattice_validation.py [--images docs/images] [--json FILE]

Prints Markdown tables and writes lattice_profiles.png, lattice_convergence.png and lattice_spheres.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

import studies.lattice_figures as figures
from shodh_moe.base.files import atomic_file, write_text
from shodh_moe.report.style import png
from shodh_moe.solvers import exact
from shodh_moe.solvers.d3q19 import SOUND_SPEED
from studies.lattice_flows import (
    MAGIC,
    Array,
    Case,
    bed,
    bgk,
    decay,
    flow,
    heights,
    oblique,
    open_channel_friction,
    relative,
    startup,
    steady,
    straight,
    swinging_film,
    wall_offset,
)
from studies.lattice_scales import generated_sets, units
from studies.lattice_spheres import sphere_positions, sphere_viscosities, spheres
from studies.lattice_tables import Table, convergence_tables
from support.common import machine

ROOT = Path(__file__).resolve().parents[2]
GAPS = (4, 8, 16, 32)


def viscosities() -> tuple[Table, dict[str, tuple[Array, Array]]]:
    rows, profiles = [], {}
    for viscosity in (0.005, 0.02, 1 / 6, 0.5, 2.0):
        found, expected = straight(8, viscosity, MAGIC)
        single, _ = straight(8, viscosity, bgk(viscosity))
        rows.append(
            [
                f"{viscosity:.3g}",
                f"{3 * viscosity + 0.5:.3g}",
                0.02 * 8 / viscosity,
                float(0.02 / SOUND_SPEED),
                relative(found, expected),
                wall_offset(found),
                relative(single, expected),
                f"{wall_offset(single):+.2g}",
            ]
        )
        if viscosity == 0.5:
            profiles = {"TRT, as here": (found, expected), "BGK": (single, expected)}
    header = ["viscosity", "relaxation time", "Re", "Ma", "TRT: error", "TRT: wall, cells", "BGK: error"]
    return Table("Plane Poiseuille, 8 cells wide", [*header, "BGK: wall, cells"], rows), profiles


def channels() -> list[Case]:
    straights = {
        "straight channel, as here": (MAGIC, 0.1),
        "straight channel, magic 1/4": (1 / 4, 0.1),
        "straight channel, BGK": (bgk(0.5), 0.5),
    }
    cases = []
    for name, (magic, viscosity) in straights.items():
        case = Case(name, "velocity", viscosity)
        for gap in GAPS:
            found, expected = straight(gap, viscosity, magic, 0.02 * 4 / gap)
            case.add(gap, relative(found, expected), expected.max())
        cases.append(case)
    for name, rise, magic in (
        ("at 45 degrees", 1, MAGIC),
        ("at 45 degrees, magic 3/8", 1, 3 / 8),
        ("1 in 2", 2, MAGIC),
    ):
        case = Case(f"oblique channel {name}", "velocity", 0.5)
        for cells in GAPS:
            found, expected = oblique(cells, rise, 0.5, magic)
            case.add(cells, relative(found, expected), expected.max())
        cases.append(case)
    return cases


def unsteady() -> list[Case]:
    cases = []
    studies: dict[str, Callable[[int], tuple[Array, Array]]] = {
        "start-up channel": lambda gap: startup(gap, 0.1),
        "swinging film, Wo 1": lambda gap: swinging_film(gap, 0.1, 1.0),
        "swinging film, Wo 4": lambda gap: swinging_film(gap, 0.1, 4.0),
    }
    for name, study in studies.items():
        case = Case(name, "velocity, all times", 0.1)
        for gap in GAPS:
            found, expected = study(gap)
            case.add(gap, relative(found, expected), np.abs(expected).max())
        cases.append(case)
    return cases


def thin_layers() -> Table:
    """Resolution of thin layers: the swinging film at the viscosities and pulse periods of the generated datasets."""
    rows = []
    for name, viscosity, period, depth in (
        ("open channel, quickstart, faster pulse", 0.005, 440, 12),
        ("open channel, quickstart", 0.005, 800, 12),
        ("open channel, full set", 0.005, 2000, 16),
        ("porous media, quickstart", 0.02, 600, 16),
    ):
        omega = 2 * math.pi / period
        found, expected = swinging_film(depth, viscosity, depth * math.sqrt(omega / viscosity))
        first = float(np.abs(found - expected)[:, 0].max() / np.abs(expected).max())
        layer = math.sqrt(2 * viscosity / omega)
        rows.append(
            [
                name,
                viscosity,
                period,
                f"{layer:.2f}",
                f"{100 * relative(found, expected):.1f} %",
                f"{100 * first:.1f} %",
            ]
        )
    header = ["set", "viscosity", "period", "layer, cells", "error", "in the first cell, of the largest speed"]
    return Table(
        "Swinging film whose layer sqrt(2 nu / omega) is about as thin as the pulse's in the sets", header, rows
    )


def films() -> Table:
    """Nusselt's film (f Re = 24 with Re = U h / nu) at one depth and several Reynolds numbers."""
    depth, rows = 16, []
    for reynolds in (1, 10, 100, 500):
        speed = 0.05
        viscosity = speed * depth / reynolds
        slope = 3 * viscosity * speed / depth**2
        moving = flow(bed(depth), viscosity, lid=True)
        found = steady(moving, [slope, 0, 0], int(depth**2 / viscosity))[0, 0, 0, 1:]
        expected = exact.poiseuille(heights(depth), 2 * depth, slope, viscosity)
        # The mean over cells is the midpoint rule, which for a parabola is too high by 1 / (8 h^2) of the mean.
        mean = found.mean() / (1 + 1 / (8 * depth**2))
        friction = 8 * slope * depth / mean**2 * (mean * depth / viscosity)
        rows.append([reynolds, viscosity, 1.5 * speed / SOUND_SPEED, f"{friction:.9f}", relative(found, expected)])
    header = ["Re = U h / nu", "viscosity", "Ma", "f Re (24)", "error of the profile"]
    return Table(f"Film on a plane bed, {depth} cells deep", header, rows)


def open_channels() -> tuple[Table, list[Case]]:
    """Open channels with side walls: f Re against Shah and London's series."""
    rows, cases = [], []
    for width in (1, 2, 4):
        case, expected = Case(f"open channel, width {width} h", "f Re", 0.5), exact.channel_friction(width)
        found = []
        for depth in GAPS:
            friction, speed = open_channel_friction(depth, width)
            found.append(friction)
            case.add(depth, abs(friction / expected - 1), speed)
        cases.append(case)
        rows.append([f"{width} h", *(f"{value:.3f}" for value in found), f"{expected:.3f}"])
    header = ["width", *(f"h = {depth}" for depth in GAPS), "Shah and London"]
    return Table("Open channel with side walls, f Re by the hydraulic radius", header, rows), cases


def decays() -> tuple[Table, list[Case]]:
    rows, cases, grids = [], [], (8, 16, 32, 64)
    for name, viscosity, start, per in (
        ("Taylor-Green", 0.02, exact.taylor_green, 2),
        ("Taylor-Green", 0.1, exact.taylor_green, 2),
        ("Beltrami, 3D", 0.05, exact.beltrami, 1),
    ):
        case, found = Case(f"{name}, viscosity {viscosity}", "velocity", viscosity), []
        for n in grids:
            rate = per * viscosity * (2 * math.pi / n) ** 2
            speed = 0.16 / n
            changed, error = decay(start(n, speed), viscosity, rate, 1.0 if per == 2 else 0.5)
            case.add(n, error, speed)
            found.append(changed)
        cases.append(case)
        orders = ", ".join(f"{math.log2(abs(a / b)):.2f}" for a, b in pairwise(found))
        rows.append([case.name, *(f"{100 * value:+.3f} %" for value in found), orders])
    header = ["flow", *map(str, grids), "orders"]
    return Table("Viscosity measured from the decay, against the nominal one, by cells a period", header, rows), cases


def compressibility() -> tuple[Table, Case]:
    """Taylor-Green at one grid and Reynolds number, at increasing speed."""
    n, reynolds, rows = 128, 100, []
    case = Case("Taylor-Green, 128 cells, Re 100", "velocity", 0.0)
    for speed in (0.01, 0.02, 0.04, 0.08, 0.16):
        case.viscosity = speed * n / reynolds
        rate = 2 * case.viscosity * (2 * math.pi / n) ** 2
        _, error = decay(exact.taylor_green(n, speed), case.viscosity, rate, 0.5)
        case.add(n, error, speed)
    orders = ["", *(math.log(b / a, 2) for a, b in pairwise(case.errors))]
    for mach, error, order in zip(case.mach, case.errors, orders, strict=True):
        rows.append([f"{mach:.3f}", f"{mach * SOUND_SPEED * n / reynolds:.3g}", error, order and f"{order:.2f}"])
    return Table("Taylor-Green, 128 cells, Re = 100", ["Ma", "viscosity", "error", "order in Ma"], rows), case


def save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the figures")
    parser.add_argument("--json", type=Path, help="write machine, versions, date and tables here")
    options = parser.parse_args()
    began = time.monotonic()
    wall_table, walls = viscosities()
    channel_cases, unsteady_cases = channels(), unsteady()
    open_table, open_cases = open_channels()
    decay_table, decay_cases = decays()
    mach_table, mach_case = compressibility()
    sphere_tables, found, plane = spheres()
    position_table, position_case = sphere_positions()
    viscosity_table, by_viscosity = sphere_viscosities()
    cases = [*channel_cases, *unsteady_cases, *open_cases, *decay_cases, position_case]
    tables = [wall_table, *convergence_tables(cases), decay_table, films(), open_table, *sphere_tables, position_table]
    tables += [viscosity_table, mach_table, thin_layers(), generated_sets(), units()]
    for table in tables:
        print(table.markdown())
    save(figures.profiles(walls), options.images / "lattice_profiles.png")
    shown = [case for case in channel_cases if case.errors[0] > 1e-4]
    groups = {
        "Steady channels": [*shown, open_cases[1]],
        "Start, swing and decay": [*unsteady_cases, *decay_cases],
        "Spheres": [position_case],
    }
    save(figures.convergence(groups, mach_case), options.images / "lattice_convergence.png")
    save(figures.spheres(found, by_viscosity, plane), options.images / "lattice_spheres.png")
    seconds = time.monotonic() - began
    print(f"\n{seconds:.0f} s")
    if options.json:
        content = {
            "benchmark": "lattice_validation",
            "machine": machine(torch.device("cpu")),
            "seconds": seconds,
            "cases": [asdict(case) | {"orders": case.orders} for case in [*cases, mach_case]],
            "tables": [asdict(table) for table in tables],
        }
        write_text(options.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
