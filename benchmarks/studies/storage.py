"""Compare layouts of a trajectory in an HDF5 file: size, and time to write it, to read one snapshot and to read all.

    python benchmarks/studies/storage.py --grids 64,128 --json benchmarks/results/storage_cpu.json

A trajectory of each domain of configs/data/full.yaml is simulated once and kept in ``--folder``. Files are written as
in production but without waiting for the disk, and read through the page cache, so that layouts and filters are
compared rather than disks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.config.load import load_config
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.solvers import simulate

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "data/full.yaml"
SNAPSHOTS, SPINUP, INTERVAL = 5, 150, 40  # enough for fields to leave their initial state
LZF = {"compression": "lzf"}
GZIP1, GZIP4 = ({"compression": "gzip", "compression_opts": level} for level in (1, 4))
SHUFFLE, CHECKSUM = {"shuffle": True}, {"fletcher32": True}
# name: (chunks per snapshot along x, None for one contiguous block; filters)
LAYOUTS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "contiguous": (None, {}),
    "snapshot": (1, {}),
    "snapshot, checksum": (1, CHECKSUM),
    "8 slabs": (8, {}),
    "8 slabs, checksum": (8, CHECKSUM),
    "snapshot, lzf": (1, LZF),
    "snapshot, shuffle, lzf": (1, {**SHUFFLE, **LZF}),
    "snapshot, shuffle, lzf, checksum": (1, {**SHUFFLE, **LZF, **CHECKSUM}),
    "8 slabs, shuffle, lzf": (8, {**SHUFFLE, **LZF}),
    "snapshot, gzip 1": (1, GZIP1),
    "snapshot, shuffle, gzip 1": (1, {**SHUFFLE, **GZIP1}),
    "snapshot, shuffle, gzip 4": (1, {**SHUFFLE, **GZIP4}),
}
Fields = dict[str, NDArray[np.float32]]


def trajectory(folder: Path, domain: str, n: int) -> Fields:
    """velocity [1, T, N, N, N, 3] and pressure [1, T, N, N, N] of a flow with a short spin-up."""
    path = folder / f"{domain}_{n}.npz"
    if not path.exists():
        config = dict(load_config(CONFIG).data.domains.items())[domain]
        config = config.model_copy(update={"spinup_steps": SPINUP, "steps_per_snapshot": INTERVAL})
        simulation = simulate(domain, config, (n, n, n), 0, 0, SNAPSHOTS, parallel=n >= 96)
        velocity = np.ascontiguousarray(np.moveaxis(simulation.velocity_T3XYZ, 1, -1)[None])
        np.savez(path, velocity=velocity, pressure=simulation.pressure_TXYZ[None])
    with np.load(path) as stored:
        return {name: stored[name] for name in ("velocity", "pressure")}


def write(path: Path, fields: Fields, slabs: int | None, filters: dict[str, Any]) -> None:
    with new_hdf5(path) as file:
        for name, values in fields.items():
            _, _, x, *rest = values.shape
            layout = {} if slabs is None else {"chunks": (1, 1, max(1, x // slabs), *rest), **filters}
            file.create_dataset(name, data=values, **layout)


def read(path: Path, snapshots: list[int]) -> None:
    with h5py.File(path) as file:
        for t in snapshots:
            for name in ("velocity", "pressure"):
                file[name][0, t]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(path: Path, fields: Fields, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    raw = sum(values.nbytes for values in fields.values())
    count = fields["velocity"].shape[1]
    rng = np.random.default_rng(0)
    # Layouts take turns, so that other work on the machine affects all of them alike.
    found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in LAYOUTS}
    for _ in range(repeats):
        for name, (slabs, filters) in LAYOUTS.items():
            written = seconds(lambda s=slabs, f=filters: write(path, fields, s, f), 1)  # type: ignore[misc]
            one = seconds(lambda: read(path, [int(rng.integers(count))]), 5)
            whole = seconds(lambda: read(path, list(range(count))), 1) / count
            found[name].append((written / count, one, whole, path.stat().st_size))
            path.unlink()
    for name, values in found.items():
        written, one, whole, size = (statistics.median(column) for column in zip(*values, strict=True))
        rows.append(
            {
                "layout": name,
                "write_s_per_snapshot": written,
                "read_random_s": one,
                "read_in_order_s_per_snapshot": whole,
                "size": size / raw,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grids", default="64,128", help="cells along an edge; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="number of measurements of each layout")
    parser.add_argument("--folder", type=Path, default=Path("build/storage"), help="folder for trajectories and files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, date and results here")
    parser.add_argument("--quick", action="store_true", help="use one tiny grid, to test the script")
    options = parser.parse_args(arguments)
    return exit_code(lambda: compare(options))


def compare(options: argparse.Namespace) -> None:
    require_writable(options.folder)
    options.folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"benchmark": "storage", "quick": options.quick, "results": []}
    content["machine"] = describe_environment() | {"load_average": os.getloadavg()[0]}
    grids, repeats = ([16], 1) if options.quick else ([int(n) for n in options.grids.split(",")], options.repeats)
    for n in grids:
        for domain, _ in load_config(CONFIG).data.domains.items():
            fields = trajectory(options.folder, domain, n)
            rows = measure(options.folder / "trajectory.hdf5", fields, repeats)
            for row in rows:
                content["results"].append({"grid": n, "domain": domain, **row})
            print(f"\n{domain} {n}^3, {sum(v[:, 0].nbytes for v in fields.values()) / 1e6:.1f} MB per snapshot")
            print(f"{'':34}{'size':>7} {'write ms':>9} {'one ms':>9} {'in order':>9}")
            for row in rows:
                times = [row[key] for key in ("write_s_per_snapshot", "read_random_s", "read_in_order_s_per_snapshot")]
                print(f"{row['layout']:34}{row['size']:7.1%} " + " ".join(f"{1e3 * t:9.2f}" for t in times), flush=True)
            if options.json:
                write_text(options.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
