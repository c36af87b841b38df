"""Tables and figures of docs/validation.md, section "3D lattice Boltzmann", from runs made here (minutes on one core).

    python benchmarks/lattice_validation.py [--images docs/images] [--json FILE]

Prints Markdown tables and writes lattice_profiles.png, lattice_convergence.png and lattice_spheres.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lattice_figures as figures
import numpy as np
import torch
from common import machine
from lattice_flows import (
    MAGIC,
    Array,
    Case,
    bed,
    bgk,
    decay,
    drag,
    flow,
    heights,
    hydrodynamic_radius,
    oblique,
    open_channel_friction,
    permeability,
    relative,
    sphere,
    startup,
    steady,
    straight,
    swinging_film,
    wall_offset,
)
from matplotlib.figure import Figure

from shodh_moe.base.files import atomic_file, write_text
from shodh_moe.config.load import load_config
from shodh_moe.report.style import png
from shodh_moe.solvers import exact, simulate
from shodh_moe.solvers.d3q19 import SOUND_SPEED
from shodh_moe.solvers.domains import DOMAINS

ROOT = Path(__file__).resolve().parents[1]
GAPS = (4, 8, 16, 32)


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in [self.header, *self.rows]]
        lines.insert(1, "|" + "---|" * len(self.header))
        return f"\n{self.title}:\n\n" + "\n".join(lines)


def cell(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    shown = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (low, high)]
    return shown[1] if high < 1.02 * low or shown[0] == shown[1] else " - ".join(shown)


def viscosities() -> tuple[Table, dict[str, tuple[Array, Array]]]:
    rows, profiles = [], {}
    for viscosity in (0.005, 0.02, 1 / 6, 0.5, 2.0):
        found, wanted = straight(8, viscosity, MAGIC)
        single, _ = straight(8, viscosity, bgk(viscosity))
        rows.append(
            [
                f"{viscosity:.3g}",
                f"{3 * viscosity + 0.5:.3g}",
                0.02 * 8 / viscosity,
                float(0.02 / SOUND_SPEED),
                relative(found, wanted),
                wall_offset(found),
                relative(single, wanted),
                f"{wall_offset(single):+.2g}",
            ]
        )
        if viscosity == 0.5:
            profiles = {"TRT, as here": (found, wanted), "BGK": (single, wanted)}
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
            found, wanted = straight(gap, viscosity, magic, 0.02 * 4 / gap)
            case.add(gap, relative(found, wanted), wanted.max())
        cases.append(case)
    for name, rise, magic in (
        ("at 45 degrees", 1, MAGIC),
        ("at 45 degrees, magic 3/8", 1, 3 / 8),
        ("1 in 2", 2, MAGIC),
    ):
        case = Case(f"oblique channel {name}", "velocity", 0.5)
        for cells in GAPS:
            found, wanted = oblique(cells, rise, 0.5, magic)
            case.add(cells, relative(found, wanted), wanted.max())
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
            found, wanted = study(gap)
            case.add(gap, relative(found, wanted), np.abs(wanted).max())
        cases.append(case)
    return cases


def thin_layers() -> Table:
    """The swinging film at the viscosities and pulse periods of the generated sets: how well so thin a layer is met."""
    rows = []
    for name, viscosity, period, depth in (
        ("open channel, quickstart, faster pulse", 0.005, 440, 12),
        ("open channel, quickstart", 0.005, 800, 12),
        ("open channel, full set", 0.005, 2000, 16),
        ("porous media, quickstart", 0.02, 600, 16),
    ):
        omega = 2 * math.pi / period
        found, wanted = swinging_film(depth, viscosity, depth * math.sqrt(omega / viscosity))
        first = float(np.abs(found - wanted)[:, 0].max() / np.abs(wanted).max())
        layer = math.sqrt(2 * viscosity / omega)
        rows.append(
            [name, viscosity, period, f"{layer:.2f}", f"{100 * relative(found, wanted):.1f} %", f"{100 * first:.1f} %"]
        )
    header = ["set", "viscosity", "period", "layer, cells", "error", "in the first cell, of the largest speed"]
    return Table(
        "Swinging film whose layer sqrt(2 nu / omega) is about as thin as the pulse's in the sets", header, rows
    )


def films() -> Table:
    """Nusselt's film: f Re = 24, Re = U h / nu, at one depth and many Reynolds numbers."""
    depth, rows = 16, []
    for reynolds in (1, 10, 100, 500):
        speed = 0.05
        viscosity = speed * depth / reynolds
        slope = 3 * viscosity * speed / depth**2
        moving = flow(bed(depth), viscosity, lid=True)
        found = steady(moving, [slope, 0, 0], int(depth**2 / viscosity))[0, 0, 0, 1:]
        wanted = exact.poiseuille(heights(depth), 2 * depth, slope, viscosity)
        # The mean over cells is the midpoint rule: of a parabola it is high by 1 / (8 h^2) of the mean.
        mean = found.mean() / (1 + 1 / (8 * depth**2))
        friction = 8 * slope * depth / mean**2 * (mean * depth / viscosity)
        rows.append([reynolds, viscosity, 1.5 * speed / SOUND_SPEED, f"{friction:.9f}", relative(found, wanted)])
    header = ["Re = U h / nu", "viscosity", "Ma", "f Re (24)", "error of the profile"]
    return Table(f"Film on a plane bed, {depth} cells deep", header, rows)


def open_channels() -> tuple[Table, list[Case]]:
    """Open channels with side walls: f Re against the series of Shah and London."""
    rows, cases = [], []
    for width in (1, 2, 4):
        case, wanted = Case(f"open channel, width {width} h", "f Re", 0.5), exact.channel_friction(width)
        found = []
        for depth in GAPS:
            friction, speed = open_channel_friction(depth, width)
            found.append(friction)
            case.add(depth, abs(friction / wanted - 1), speed)
        cases.append(case)
        rows.append([f"{width} h", *(f"{value:.3f}" for value in found), f"{wanted:.3f}"])
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
    """Taylor-Green at one grid and Reynolds number, faster and faster."""
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


def spheres(sizes: tuple[int, ...] = (16, 24, 32, 48, 64)) -> tuple[list[Table], dict[int, list[float]], Array]:
    """Drag of simple cubic arrays at all of Zick and Homsy's fractions, the sphere at the middle of the cube."""
    found: dict[int, list[float]] = {n: [] for n in sizes}
    errors: dict[int, list[float]] = {n: [] for n in sizes}
    rows, radii, picture, reynolds = [], [], np.zeros(0), 0.0
    for fraction, known in exact.ZICK_HOMSY.items():
        larger = []
        for n in sizes:
            solid_XYZ = sphere(n, fraction)
            through, velocity_3XYZ = permeability(solid_XYZ, 2.0)
            found[n].append(drag(through, fraction))
            errors[n].append(found[n][-1] / known - 1)
            volume = float(solid_XYZ.mean())
            larger.append(f"{n * (hydrodynamic_radius(through) - exact.sphere_radius(volume)):+.3f}")
            reynolds = max(reynolds, 2 * n * exact.sphere_radius(fraction) * float(velocity_3XYZ[0].mean()))
            if fraction == 0.216 and n == sizes[-1]:
                picture = np.where(solid_XYZ, np.nan, velocity_3XYZ[0])[:, n // 2]
        over_radius = 2 / (9 * fraction * known)
        cells = [f"{found[n][-1]:.3f} ({100 * errors[n][-1]:+.1f} %)" for n in sizes]
        rows.append([f"{fraction:g}", f"{over_radius:.3g}", f"{known:g}", *cells])
        radii.append([f"{fraction:g}", *larger])
    means = [f"{100 * float(np.mean(np.abs(errors[n]))):.1f} %" for n in sizes]
    rows.append(["mean size of the error", "", "", *means])
    grids = [f"{n}^3" for n in sizes]
    header = ["solid", "permeability / a^2", "K, Zick and Homsy", *grids]
    shown = f"{reynolds:.0e}".replace("e-0", "e-")
    tables = [
        Table(f"Drag K of a simple cubic array of spheres, viscosity 2, Re below {shown}", header, rows),
        Table(
            "Radius that the array's drag stands for, less that of the voxels' volume, in cells",
            ["solid", *grids],
            radii,
        ),
    ]
    return tables, found, picture


def sphere_positions(sizes: tuple[int, ...] = (16, 24, 32, 48, 64), positions: int = 6) -> tuple[Table, Case]:
    """One array with the sphere at random places of the lattice: the error without the luck of one set of voxels."""
    case, rows = Case("sphere array 0.216, mean of 6 positions", "drag", 2.0), []
    shifts = np.random.default_rng(0).uniform(0, 1, (positions, 3))
    for n in sizes:
        runs = [permeability(sphere(n, 0.216, shift), 2.0) for shift in shifts]
        errors = [drag(through, 0.216) / exact.ZICK_HOMSY[0.216] - 1 for through, _ in runs]
        case.add(n, abs(float(np.mean(errors))), max(float(velocity[0].mean()) for _, velocity in runs))
        case.spread.append(float(np.std(errors)))
        rows.append(
            [f"{n}^3", f"{100 * np.mean(errors):+.2f} %", f"{100 * min(errors):+.2f} %", f"{100 * max(errors):+.2f} %"]
        )
    header = ["grid", "mean error of K", "lowest", "highest"]
    return Table(f"Solid fraction 0.216, {positions} random positions of the sphere on the lattice", header, rows), case


def sphere_viscosities() -> tuple[Table, dict[str, tuple[list[float], list[float]]]]:
    solid_XYZ, values = sphere(24, 0.216), [0.01, 0.03, 0.1, 0.3, 1.0, 2.0]
    by_collision = {
        "TRT, as here": [drag(permeability(solid_XYZ, value)[0], 0.216) for value in values],
        "BGK": [drag(permeability(solid_XYZ, value, bgk(value))[0], 0.216) for value in values],
    }
    rows = [[name, *(f"{k:.3f}" for k in drags)] for name, drags in by_collision.items()]
    table = Table("K at solid fraction 0.216, 24^3, by viscosity (7.442 published)", ["", *map(str, values)], rows)
    return table, {name: (values, drags) for name, drags in by_collision.items()}


def generated_sets(trajectories: int = 3) -> Table:
    """Numbers of the flows of the quickstart, and of the other domains at their defaults, from the first of each."""
    config = load_config(ROOT / "configs" / "quickstart.yaml").data
    grid = (config.grid[0], config.grid[1], config.grid[2])
    named = dict(config.domains.items())
    domains = named | {name: kind() for name, kind in DOMAINS.items() if name not in named}
    rows = []
    for name, domain in domains.items():
        of: dict[str, list[float]] = {}
        for number in range(trajectories):
            drawn = simulate(name, domain, grid, config.seed, number, config.snapshots).parameters
            nu, length, reynolds, fastest = (
                float(drawn[key]) for key in ("viscosity", "length", "reynolds", "max_speed")
            )
            values = {
                "length": length,
                "speed": reynolds * nu / length,
                "Re": reynolds,
                "Ma": float(drawn["mach"]),
                "cell Re": fastest / nu,
                # Mean free path over length; the path of a lattice gas is viscosity sqrt(pi / 2) / sound speed.
                "Kn": nu * math.sqrt(math.pi / 2) / SOUND_SPEED / length,
            }
            for key, value in values.items():
                of.setdefault(key, []).append(float(value))
        title = name.replace("_", " ") + (" (quickstart)" if name in named else " (defaults)")
        rows.append([title, domain.viscosity, f"{3 * domain.viscosity + 0.5:.3f}", *map(span, of.values())])
    header = ["domain", "viscosity", "relaxation time", *of]
    size = " x ".join(map(str, grid))
    return Table(
        f"First {trajectories} trajectories of every domain, {size}, {config.snapshots} snapshots", header, rows
    )


def units() -> Table:
    """What the lattice units stand for when the fluid is water (1e-6 m^2/s, 1000 kg/m^3)."""
    rows = []
    for name, viscosity, speed, dx in (
        ("channel, depth 0.1 m in 31 cells", 0.005, 0.03, 0.1 / 31),
        ("channel, depth 10 mm in 31 cells", 0.005, 0.03, 0.01 / 31),
        ("porous sample, voxels of 10 um", 0.02, 0.027, 1e-5),
        ("porous sample, voxels of 2 um", 0.02, 0.027, 2e-6),
    ):
        dt = viscosity * dx**2 / 1e-6
        rows.append([name, viscosity, f"{dx:.3g} m", f"{dt:.3g} s", f"{dx / dt:.3g} m/s", f"{speed * dx / dt:.3g} m/s"])
        rows[-1] += [f"{1000 * (dx / dt) ** 2:.3g} Pa"]
    header = ["flow of water", "viscosity", "cell", "time step", "velocity 1", "mean speed", "pressure 1"]
    return Table("Lattice units as physical ones", header, rows)


def convergence_tables(cases: Sequence[Case]) -> Iterator[Table]:
    header = ["case", "norm", "viscosity", "Re", "Ma", "error by size in cells", "orders"]
    rows = []
    for case in cases:
        errors = ", ".join(f"{n}: {error:.1e}" for n, error in zip(case.sizes, case.errors, strict=True))
        orders = ", ".join(f"{order:.2f}" for order in case.orders) if max(case.errors) > 1e-9 else "rounding"
        rows.append([case.name, case.norm, case.viscosity, span(case.reynolds), span(case.mach), errors, orders])
    yield Table("Convergence", header, rows)


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
