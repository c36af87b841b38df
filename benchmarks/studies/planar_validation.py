"""Make tables and figures of docs/validation.md, section "2D solvers" (about three minutes).

    python benchmarks/studies/planar_validation.py [--images docs/images]

Prints Markdown tables and writes planar_convergence.png, planar_dam_breaks.png and planar_regimes.png.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.ccm.family import FAMILIES, SOLVERS, Family, initial_states, simulate
from shodh_moe.solvers import trajectory_seed
from shodh_moe.solvers.planar import exact, navier_stokes, shallow_water
from shodh_moe.solvers.planar.navier_stokes import NavierStokes
from shodh_moe.solvers.planar.reaction_diffusion import ReactionDiffusion, cosines
from shodh_moe.solvers.planar.shallow_water import ShallowWater
from studies.planar_figures import PLACES, Lines, draw

SIDE, END = 10.0, 1.5  # length and end time of the dam breaks on a line


def seeds(count: int) -> list[np.random.SeedSequence]:
    return [trajectory_seed(0, "validation", index) for index in range(count)]


def fluctuation(family: Family, fields: Tensor) -> Tensor:
    """Fields minus the still water around a dam. Other families' fields are already fluctuations."""
    if not isinstance(family.settings, ShallowWater):
        return fields
    still = torch.tensor([family.settings.outer_height, 0.0, 0.0], dtype=fields.dtype)
    return fields - still[:, None, None]


def distance(family: Family, a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| / ||b|| of fluctuations over the last three axes."""
    a, b = fluctuation(family, a.double()), fluctuation(family, b.double())
    return (a - b).flatten(-3).norm(dim=-1) / b.flatten(-3).norm(dim=-1)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(number(cell) for cell in row) + " |")


def number(cell: object) -> str:
    return f"{cell:.2g}" if isinstance(cell, float) else str(cell)


def order(errors: Sequence[float], ratio: float = 2.0) -> list[object]:
    return ["", *(f"{math.log(a / b, ratio):.2f}" for a, b in pairwise(errors))]


def in_time() -> Lines:
    """Errors at the last snapshot of each family's time step and of finer ones, at both ends of its parameter range."""
    lines: Lines = {}
    for family in FAMILIES.values():
        name = family.name.replace("_", " ")
        key = "courant" if isinstance(family.settings, ShallowWater) else "step"
        start = getattr(family.settings, key)
        factors = (1.0, 0.5, 0.25) if key == "step" else (1.0, 0.5, 0.25, 0.125)
        for place in (-1.5, 1.5):
            value = family.value(place)

            def end(factor: float, family: Family = family, key: str = key, value: float = value) -> Tensor:
                settings = replace(family.settings, **{key: getattr(family.settings, key) * factor})
                return simulate(replace(family, settings=settings), seeds(4), value)[:, -1]

            best = end(factors[-1] / 4)
            errors = [float(distance(family, end(factor), best).mean()) for factor in factors]
            lines[f"{name}, s = {place:+g}"] = ([start * f for f in factors], errors)
    rows = []
    for name, (steps, errors) in lines.items():
        cells = [f"{step:g}: {error:.1e}" for step, error in zip(steps[:3], errors, strict=False)]
        rows.append([name, *cells, *order(errors)[1:3]])
    header = ["family", "in use", "1/2", "1/4", "order", "order"]
    table("Time step (Courant number for shallow water): error at the last snapshot", header, rows)
    return lines


def restricted(family: Family, fields: Tensor, grid: int) -> Tensor:
    """Restrict fields to a coarser grid: truncate the cosine or Fourier series, or take cell means."""
    fine = fields.shape[-1]
    if isinstance(family.settings, ShallowWater):
        return torch.nn.functional.avg_pool2d(fields, fine // grid)
    if isinstance(family.settings, ReactionDiffusion):
        down = cosines(grid).mT @ cosines(fine)[:grid] * math.sqrt(grid / fine)
        return down @ fields @ down.mT
    waves = torch.fft.fftfreq(grid, 1 / grid).long()
    series = torch.fft.fft2(fields)[..., waves[:, None], waves[None, :]]
    return torch.fft.ifft2(series).real * (grid / fine) ** 2


def in_space() -> Lines:
    lines: Lines = {}
    for family in FAMILIES.values():
        grids, fine = ((48, 96), 192) if isinstance(family.settings, ShallowWater) else ((48, 64, 96), 144)
        for place in (-1.5, 1.5):
            value = family.value(place)
            # A finer grid has faster waves.
            settings = family.settings
            settings = replace(settings, step=settings.step / 4) if isinstance(settings, NavierStokes) else settings
            best = simulate(replace(family, grid=fine, settings=settings, snapshots=11), seeds(2), value)[:, -1]
            errors = []
            for grid in grids:
                ours = simulate(replace(family, grid=grid, settings=settings, snapshots=11), seeds(2), value)[:, -1]
                errors.append(float(distance(family, ours, restricted(family, best, grid)).mean()))
            lines[f"{family.name.replace('_', ' ')}, s = {place:+g}"] = ([float(g) for g in grids], errors)
    rows = [
        [name, *(dict(zip(*line, strict=True)).get(g, "") for g in (48.0, 64.0, 96.0))] for name, line in lines.items()
    ]
    table("Grid: error at the middle snapshot", ["family", "48", "64", "96"], rows)
    return lines


def on_a_line(cells: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    points = (torch.arange(8 * cells, dtype=torch.float64) + 0.5) * SIDE / (8 * cells) - SIDE / 2
    return points, lambda values: values.view(cells, 8).mean(1)


def line_run(depth: Tensor, momentum: Tensor | float) -> Tensor:
    state = torch.zeros(1, 3, 4, len(depth), dtype=torch.float64)
    state[:, 0], state[:, 1] = depth, momentum
    return shallow_water.simulate(state, torch.ones(1), 2, END, ShallowWater(side=SIDE))[0, -1, 0, 0]


def dam_breaks() -> tuple[Lines, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    lines: Lines = {}
    pictures = {}
    cases = {
        "onto depth 1 (Stoker)": (2.0, 1.0),
        "onto depth 0.1 (Stoker)": (2.0, 0.1),
        "onto dry bed (Ritter)": (1.0, 0.0),
    }
    grids = (50, 100, 200, 400)
    for name, (left, right) in cases.items():
        errors = []
        for cells in grids:
            x, means = on_a_line(cells)
            found = line_run(means(torch.where(x < 0, left, right)), 0.0)
            h = exact.stoker(x, END, left, right, 1.0)[0] if right else exact.ritter(x, END, left, 1.0)[0]
            errors.append(float((found - means(h)).abs().mean()) / (left - right))
            if cells == 100:
                pictures[f"{left:g} {name}"] = (means(x), found, means(h))
        lines[name] = ([float(g) for g in grids], errors)
    errors = []
    for cells in grids:
        x, means = on_a_line(cells)
        h, u = exact.simple_wave(x, 0.0, 1.0, 0.1, 1.0)
        found = line_run(means(h), means(h * u))
        errors.append(float((found - means(exact.simple_wave(x, END, 1.0, 0.1, 1.0)[0])).abs().mean()) / 0.1)
    lines["smooth simple wave"] = ([float(g) for g in grids], errors)
    rows = []
    for name, (_, errors) in lines.items():
        rows += [[name, *errors], ["  order", *order(errors)]]
    table("Shallow water on a line: mean error of the depth / its range", ["case", *map(str, grids)], rows)
    return lines, pictures


def radial() -> None:
    r, h = exact.radial_dam_break(2.0, 1.0, 0.5, 1.0, 1.0, cells=8000)
    at, rows = np.linspace(0.1, 2.0, 400), []
    for cells in (48, 96, 192):
        x = (torch.arange(8 * cells, dtype=torch.float64) + 0.5) * 5 / (8 * cells) - 2.5
        share = ((x**2 + x[:, None] ** 2) <= 0.25).double().view(cells, 8, cells, 8).mean((1, 3))
        initial = torch.zeros(1, 3, cells, cells, dtype=torch.float64)
        initial[:, 0] = 1 + share
        depth = shallow_water.simulate(initial, torch.ones(1), 2, 1.0)[0, -1, 0]
        centres, half = x.view(-1, 8).mean(1), slice(cells // 2, None)
        radius = torch.sqrt(centres**2 + centres[:, None] ** 2)
        straight = np.interp(at, radius[cells // 2, half], depth[cells // 2, half])
        slanted = np.interp(at, radius.diagonal()[half], depth.diagonal()[half])
        scale = np.abs(np.interp(at, r, h) - 1).mean()
        mirrored = max(float((depth - other).abs().max()) for other in (depth.flip(0), depth.flip(1), depth.mT))
        profile = np.abs(straight - np.interp(at, r, h)).mean() / scale
        rows.append([cells, float(profile), float(np.abs(straight - slanted).mean() / scale), mirrored])
    header = ["grid", "against the equations in r", "axis against diagonal", "mirror images, largest difference"]
    table("Radial dam break, 2 to 1, radius 0.5, t = 1: mean differences / mean fluctuation", header, rows)


def exactness() -> None:
    double = torch.float64
    viscosity = torch.tensor([1e-4, 1e-3, 1e-2], dtype=double)
    free, forced = NavierStokes(forcing=0.0), NavierStokes()
    vortices = exact.taylor_green(48, 1.0, 2, viscosity, 0.0).expand(3, -1, -1, -1)
    rows: list[list[object]] = []
    found = navier_stokes.simulate(vortices, viscosity, 2, 5.0, free)[:, -1]
    error = (found - exact.taylor_green(48, 1.0, 2, viscosity, 5.0)).abs().max()
    rows.append(["navier stokes", "Taylor-Green vortices, nu = 1e-4, 1e-3, 1e-2, t = 5", "largest error", float(error)])
    found = navier_stokes.simulate(torch.zeros_like(vortices), viscosity, 2, 5.0, forced)[:, -1]
    error = (found - exact.forced_shear(navier_stokes.forcing(forced, 48, 48), 1.0, viscosity, 5.0)).abs().max()
    rows.append(["navier stokes", "forced shear from rest, the same nu, t = 5", "largest error", float(error)])
    start = navier_stokes.random_initial(seeds(4), 48)
    found = navier_stokes.simulate(start, torch.full((4,), 1e-15, dtype=double), 2, 5.0, free)[:, :, 0]
    enstrophy = found.square().sum((2, 3))
    change = (enstrophy[:, 1] / enstrophy[:, 0] - 1).abs().max()
    rows.append(["navier stokes", "enstrophy without viscosity, t = 5", "relative change", float(change)])
    walls = ShallowWater(walls="reflective")
    basin = shallow_water.random_initial(seeds(4), torch.full((4,), 2.0), 48, walls)
    mass = shallow_water.simulate(basin, torch.ones(4, dtype=double), 2, 10.0, walls)[:, :, 0].sum((2, 3))
    drift = (mass[:, 1] / mass[:, 0] - 1).abs().max()
    rows.append(["shallow water", "mass between walls, t = 10", "relative change", float(drift)])
    for family in FAMILIES.values():
        fields, parameter = initial_states(family, seeds(4), family.value(-1.5))
        solver, name = SOLVERS[type(family.settings)].simulate, family.name.replace("_", " ")
        rounded = solver(fields.float(), parameter, family.snapshots, family.interval, family.settings)[:, -1]
        full = solver(fields, parameter, family.snapshots, family.interval, family.settings)[:, -1]
        error = distance(family, rounded, full).max()
        rows.append([name, "float32 against float64, last snapshot, s = -1.5", "relative, worst of 4", float(error)])
    table("Exact solutions, conservation, precision (48 x 48)", ["equation", "check", "measure", "value"], rows)


def effect() -> dict[str, list[Tensor]]:
    rows, pictures = [], {}
    for family in FAMILIES.values():
        began = time.process_time()
        runs = {place: simulate(family, seeds(8), family.value(place)) for place in PLACES}
        seconds = (time.process_time() - began) / (8 * len(PLACES))
        title = f"{family.name.replace('_', ' ')}, {family.parameter.replace('_', ' ')}"
        middle = runs[0.0]
        against = [distance(family, runs[place], middle) for place in PLACES if place]
        ends = [distance(family, runs[s], runs[math.copysign(1.0, s)]) for s in (-1.5, 1.5)]
        cells = [f"{d[:, 1:].mean():.2f} / {d[:, -1].mean():.2f}" for d in (*against, *ends)]
        rows.append(
            [title, f"{family.value(-1.5):.3g} ... {family.value(1.5):.3g}", *cells, f"{1000 * seconds:.0f} ms"]
        )
        pictures[title] = [runs[place][0, -1, 0] for place in PLACES]
    header = [
        "family",
        "values at s = -1.5 ... 1.5",
        "-1.5 / 0",
        "-1 / 0",
        "1 / 0",
        "1.5 / 0",
        "-1.5 / -1",
        "1.5 / 1",
        "CPU",
    ]
    table("Distance from the same random initial state: mean over snapshots / last snapshot", header, rows)
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the figures")
    images = parser.parse_args().images
    exactness()
    time_lines = in_time()
    space_lines = in_space()
    dam_lines, profiles = dam_breaks()
    radial()
    draw(images, time_lines, space_lines, dam_lines, profiles, effect())


if __name__ == "__main__":
    main()
