"""Drag of sphere arrays by solid fraction, position and viscosity, against Zick and Homsy (1982)."""

from __future__ import annotations

import numpy as np

from shodh_moe.solvers import exact
from studies.lattice_flows import Array, Case, bgk, drag, hydrodynamic_radius, permeability, sphere
from studies.lattice_tables import Table


def spheres(sizes: tuple[int, ...] = (16, 24, 32, 48, 64)) -> tuple[list[Table], dict[int, list[float]], Array]:
    """Drag of simple cubic arrays at all of Zick and Homsy's fractions, with the sphere in the middle of the cube."""
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
    """One array with the sphere at random positions on the lattice, to average over voxelisations."""
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
