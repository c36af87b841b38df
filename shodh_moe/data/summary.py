"""Write dataset.yaml: a readable summary of a generated dataset, its Mach and Reynolds numbers, and its units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shodh_moe.base.files import write_text
from shodh_moe.config import DataConfig
from shodh_moe.data.reading import read_provenance
from shodh_moe.data.well import UNITS

DATASET_FILE = "dataset.yaml"

CONVERSION = {
    "all_values": UNITS,
    "choose": "a cell size dx [m], a kinematic viscosity nu [m2/s] and a density rho [kg/m3]",
    "time_step": "dt = viscosity * dx^2 / nu, viscosity the lattice value of the domain",
    "velocity": "u [m/s] = u_lattice * dx / dt",
    "pressure": "p [Pa] = p_lattice * rho * (dx / dt)^2, against the mean",
    "body_force": "f [N/m3] = f_lattice * rho * dx / dt^2",
    "keeps": "the Reynolds number; the Mach number is the lattice's own, and only has to be small",
    "reynolds": "abs(mean speed) * length / viscosity over all snapshots, length as in each file's provenance; a "
    "domain without a mean flow has the rms of a velocity component as its speed",
    "mach": "largest speed of the trajectory over the lattice's speed of sound, 1 / sqrt(3)",
}


def summarise(folder: Path, config: DataConfig, files: Sequence[tuple[str, Path]]) -> list[str]:
    """Write ``<folder>/dataset.yaml`` from the provenance of ``files`` (domain, path); return the lines of a table.

    Raises:
        UserError: a file is damaged, or the folder cannot be written.
    """
    domains: dict[str, Any] = {}
    for name, domain in config.domains.items():
        found = [(path, read_provenance(path)) for of, path in files if of == name]
        splits = [path.parent.name for path, _ in found]
        parameters = [provenance["parameters"] for _, provenance in found]
        domains[name] = {
            "trajectories": {split: splits.count(split) for split in dict.fromkeys(splits)},
            "snapshots": len(found) * config.snapshots,
            "time_steps_between_snapshots": domain.steps_per_snapshot,
            **{key: _range(parameters, key) for key in ("viscosity", "length", "reynolds", "mach")},
            "devices": sorted({str(provenance.get("device", "cpu")) for _, provenance in found}),
        }
    content = {
        "name": config.name,
        "label": "synthetic",
        "solver": "D3Q19 lattice Boltzmann, two relaxation times",
        "grid": list(config.grid),
        "snapshots_per_trajectory": config.snapshots,
        "seed": config.seed,
        "domains": domains,
        "units": CONVERSION,
    }
    text = yaml.safe_dump(content, sort_keys=False, width=120)
    path = folder / DATASET_FILE
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)
    rows: list[tuple[str, ...]] = [("domain", "trajectories", "viscosity", "Reynolds number", "Mach number")]
    for name, one in domains.items():
        count = sum(one["trajectories"].values())
        rows.append((name, f"{count:,}", *(_shown(one[key]) for key in ("viscosity", "reynolds", "mach"))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(parameters: Sequence[Any], key: str) -> float | list[float]:
    """Return the [smallest, largest] value, or the value if all are equal."""
    values = [float(one[key]) for one in parameters]
    return [min(values), max(values)] if min(values) < max(values) else values[0]


def _shown(value: float | list[float]) -> str:
    return " to ".join(f"{one:.3g}" for one in value) if isinstance(value, list) else f"{value:.3g}"
