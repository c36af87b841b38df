"""Snapshots per second of the reader, of bare h5py and of the_well's WellDataset, from the same files in the same run.

    python benchmarks/reader.py --json benchmarks/results/reader_cpu.json

WellDataset needs the_well 1.2.0; without it, its rows are left out. The files are made once in ``--folder``. Readers
take turns, read the same snapshots in the same order, and start each turn with nothing read ahead. With --memory N, the
reader also runs for N batches, and the process's memory after 100 batches is compared with that at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.data import TrajectoryRecord, compute_stats, list_trajectories, write_stats, write_trajectory
from shodh_moe.data.loader import Snapshots, mixed_batches, read_batches
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.data.symmetry import allowed
from shodh_moe.solvers import Simulation

BATCH = 4
DOMAINS = ("open_channel", "porous_media")
Turn = Callable[[list[int]], object]


def make_files(folder: Path, grid: int, files: int, snapshots: int) -> Path:
    """Write a training split of random numbers: the reading speed does not depend on the values."""
    folder = folder / f"{grid}_{files}x{snapshots}"
    shape, rng = (grid, grid, grid), np.random.default_rng(0)
    for index in range(files):
        domain = DOMAINS[index % 2]
        path = folder / "data" / "train" / f"{domain}_{index:04d}.hdf5"
        if not path.exists():
            simulation = Simulation(
                velocity_T3XYZ=rng.standard_normal((snapshots, 3, *shape), dtype=np.float32),
                pressure_TXYZ=rng.standard_normal((snapshots, *shape), dtype=np.float32),
                solid_XYZ=rng.random(shape) < 0.3,
                lid=False,
                time_T=np.arange(snapshots, dtype=np.float32),
                parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
            )
            write_trajectory(path, simulation, dataset_name="reader", domain=domain, provenance={})
    if not (folder / "stats.yaml").exists():
        write_stats(folder, compute_stats([]))
    return folder


def bare_h5py(records: list[TrajectoryRecord], stack: ExitStack) -> dict[str, Turn]:
    """Read velocity and pressure as stored, from files that stay open.

    Each batch goes into new arrays, as training needs it. "same array" instead reads every snapshot into the same
    arrays, which partly stay in the processor's cache.
    """
    grid, length = records[0].grid, records[0].n_snapshots
    files = [stack.enter_context(h5py.File(record.path, "r")) for record in records]
    fields = [(file["t1_fields/velocity"], file["t0_fields/pressure"]) for file in files]
    masks = [file["t0_fields/solid"] for file in files]

    def read(index: int, velocity_XYZ3: np.ndarray, pressure_XYZ: np.ndarray) -> None:
        velocity, pressure = fields[index // length]
        velocity.read_direct(velocity_XYZ3, np.s_[0, index % length])
        pressure.read_direct(pressure_XYZ, np.s_[0, index % length])

    def batches(masked: bool, indices: list[int]) -> None:
        for first in range(0, len(indices), BATCH):
            velocity, pressure = np.empty((BATCH, *grid, 3), np.float32), np.empty((BATCH, *grid), np.float32)
            solid = np.empty((BATCH, *grid), np.float32) if masked else None
            for slot, index in enumerate(indices[first : first + BATCH]):
                read(index, velocity[slot], pressure[slot])
                if solid is not None:
                    masks[index // length].read_direct(solid[slot], np.s_[0])

    same = np.empty((*grid, 3), np.float32), np.empty(grid, np.float32)

    def into_same(indices: list[int]) -> None:
        for index in indices:
            read(index, *same)

    return {
        "bare h5py": partial(batches, False),
        "bare h5py with the mask": partial(batches, True),
        "bare h5py, same array": into_same,
    }


def ours(snapshots: Snapshots) -> dict[str, Turn]:
    """Read with our reader: channels first, with the mask, every value checked."""
    same = np.empty((5, *snapshots.records[0].grid), np.float32)

    def batches(workers: int, indices: list[int]) -> None:
        parts = [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]
        for _ in read_batches(snapshots, parts, workers):
            pass

    def into_same(indices: list[int]) -> None:
        for index in indices:
            snapshots.read(index, same)

    return {
        "ours": partial(batches, 0),
        "ours, same array": into_same,
        "ours, 1 workers": partial(batches, 1),
        "ours, 2 workers": partial(batches, 2),
    }


def well(folder: Path, snapshots: Snapshots) -> dict[str, Turn]:
    """Read with WellDataset, directly and through torch's loader.

    A sample is two successive snapshots, so a turn has half as many samples, and all readers read the same amount.
    """
    try:
        from the_well.data import WellDataset
    except ImportError:
        return {}
    data = WellDataset(path=str(folder), well_split_name="train")
    per_file = snapshots.records[0].n_snapshots

    def pairs(indices: list[int]) -> list[int]:
        numbers = (divmod(index, per_file) for index in indices[: len(indices) // 2])
        return [number * (per_file - 1) + min(snapshot, per_file - 2) for number, snapshot in numbers]

    def direct(indices: list[int]) -> None:
        for index in pairs(indices):
            data[index]

    order: list[int] = []
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=BATCH // 2,
        sampler=order,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def loaded(indices: list[int]) -> None:
        order[:] = pairs(indices)
        for _ in loader:
            pass

    return {"WellDataset": direct, "WellDataset, 2 workers": loaded}


def forget(records: list[TrajectoryRecord]) -> None:
    """Ask the system to drop the files from its page cache."""
    for record in records:
        file = os.open(record.path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def compare(turns: dict[str, Turn], records: list[TrajectoryRecord], rounds: int, cold: bool) -> list[dict[str, Any]]:
    """Samples per second of each reader. The readers take turns in a new order every round."""
    rng, total = random.Random(0), sum(record.n_snapshots for record in records)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(-1, rounds):
        indices = rng.sample(range(total), total // BATCH * BATCH)
        for name in rng.sample(list(turns), len(turns)):
            if cold:
                forget(records)
            began = time.perf_counter()
            turns[name](indices)
            if number >= 0:  # the first round is a warm-up
                seconds[name].append((time.perf_counter() - began) / len(indices))
    rows = []
    for name, values in seconds.items():
        low, _, _, high = statistics.quantiles(values, n=5) if rounds > 1 else values * 4
        rows.append(
            {
                "reader": name,
                "page_cache": "cold" if cold else "warm",
                "samples_per_second": 1 / statistics.median(values),
                "samples_per_second_p20": 1 / high,
                "samples_per_second_p80": 1 / low,
                "rounds": rounds,
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    speed = {row["reader"]: row["samples_per_second"] for row in rows}
    found = {
        f"ours{how}_over_h5py": speed[f"ours{how}"] / speed["bare h5py"] for how in ("", ", 1 workers", ", 2 workers")
    }
    found["ours_over_h5py with the mask"] = speed["ours"] / speed["bare h5py with the mask"]
    found["ours_over_h5py, same array"] = speed["ours, same array"] / speed["bare h5py, same array"]
    for suffix in ("", ", 2 workers"):
        if f"WellDataset{suffix}" in speed:
            found[f"ours_over_WellDataset{suffix}"] = speed[f"ours{suffix}"] / speed[f"WellDataset{suffix}"]
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(snapshots: Snapshots, batches: int, workers: int) -> dict[str, Any]:
    """Resident bytes after 100 batches, and after a tenth, half and all of them."""
    sampler = DomainSampler(snapshots.sizes, 2, seed=0)
    reader: Iterator[torch.Tensor] = read_batches(snapshots, mixed_batches(sampler, snapshots), workers)
    seen = [resident_bytes() for number, _ in zip(range(1, batches + 1), reader, strict=False) if number % 100 == 0]
    at = {"at_100": seen[0], "at_tenth": seen[len(seen) // 10 - 1], "at_half": seen[len(seen) // 2 - 1]}
    return {"batches": batches, "workers": workers, **at, "at_end": seen[-1], "most": max(seen)}


def symmetry_seconds(grid: int) -> float:
    """Median time of rotating a sample, over the 48 rotations and reflections."""
    fields, times = torch.randn(1, 5, grid, grid, grid), []
    for symmetry in allowed((grid, grid, grid), (True, True, True), forced=False):
        began = time.perf_counter()
        symmetry.apply(fields)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def work(options: argparse.Namespace) -> None:
    if options.json:
        require_writable(options.json.absolute().parent)
    if options.files < 2 or options.snapshots < 3:
        raise UserError("--files must be at least 2 and --snapshots at least 3")
    keep_freed_memory()
    torch.set_num_threads(1)
    folder = make_files(options.folder, options.grid, options.files, options.snapshots)
    snapshots = Snapshots(list_trajectories(folder, "train"))
    content: dict[str, Any] = {
        "benchmark": "reader",
        "machine": describe_environment() | {"load_average": os.getloadavg()[0]},
        "case": {"grid": options.grid, "files": options.files, "snapshots": options.snapshots, "batch": BATCH},
        "results": [],
        "ratios": {},
    }
    if options.memory:  # runs first, while the process has nothing else in memory
        content["memory"] = [memory(snapshots, options.memory, workers) for workers in (0, 2)]
        for row in content["memory"]:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    content["symmetry_seconds"] = symmetry_seconds(options.grid)
    with ExitStack() as stack:
        turns = bare_h5py(snapshots.records, stack) | ours(snapshots) | well(folder, snapshots)
        for cold, rounds in ((False, options.rounds), (True, options.cold_rounds)):
            if rounds:
                rows = compare(turns, snapshots.records, rounds, cold)
                content["results"] += rows
                content["ratios"]["cold" if cold else "warm"] = ratios(rows)
                for row in rows:
                    print(f"{row['page_cache']}  {row['reader']:<24} {row['samples_per_second']:8.1f} samples/s")
                print("  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(rows).items()), flush=True)
            if options.json:
                write_text(options.json, json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=int, default=128, help="cells along an edge; default: %(default)s")
    parser.add_argument("--files", type=int, default=8, help="number of files; default: %(default)s")
    parser.add_argument("--snapshots", type=int, default=6, help="snapshots per file; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds with the files in the page cache")
    parser.add_argument("--cold-rounds", type=int, default=3, help="timed rounds with an empty page cache; 0 for none")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="batches of the memory test; default: none")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/reader"), help="folder of the files; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, date and results here")
    options = parser.parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
