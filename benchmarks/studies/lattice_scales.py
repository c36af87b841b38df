"""Dimensionless numbers of the generated datasets, and lattice units in physical units."""

from __future__ import annotations

import math
from pathlib import Path

from shodh_moe.config.load import load_config
from shodh_moe.solvers import simulate
from shodh_moe.solvers.d3q19 import SOUND_SPEED
from shodh_moe.solvers.domains import DOMAINS
from studies.lattice_tables import Table, span

ROOT = Path(__file__).resolve().parents[2]


def generated_sets(trajectories: int = 3) -> Table:
    """Numbers of the quickstart's flows and of the other domains at their defaults, from their first trajectories."""
    config = load_config(ROOT / "configs" / "quickstart.yaml").data
    grid = (config.grid[0], config.grid[1], config.grid[2])
    named = dict(config.domains.items())
    domains = named | {name: kind() for name, kind in DOMAINS.items() if name not in named}
    rows = []
    for name, domain in domains.items():
        by_quantity: dict[str, list[float]] = {}
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
                # Mean free path over length; a lattice gas has the mean free path viscosity sqrt(pi / 2) / sound speed.
                "Kn": nu * math.sqrt(math.pi / 2) / SOUND_SPEED / length,
            }
            for key, value in values.items():
                by_quantity.setdefault(key, []).append(float(value))
        title = name.replace("_", " ") + (" (quickstart)" if name in named else " (defaults)")
        rows.append([title, domain.viscosity, f"{3 * domain.viscosity + 0.5:.3f}", *map(span, by_quantity.values())])
    header = ["domain", "viscosity", "relaxation time", *by_quantity]
    size = " x ".join(map(str, grid))
    return Table(
        f"First {trajectories} trajectories of every domain, {size}, {config.snapshots} snapshots", header, rows
    )


def units() -> Table:
    """Lattice units in physical units for water (1e-6 m^2/s, 1000 kg/m^3)."""
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
