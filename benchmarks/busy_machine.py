"""Measure how much other work on the machine slows down data generation and torch's threads.

    python benchmarks/busy_machine.py --json busy_machine.json

Each mode runs several times, alternately alone and beside two busy processes; medians are reported. ``generate``
simulates short trajectories of configs/quickstart.yaml, one or two flows at a time, in threads of one process (as
``shodh data generate`` does) or in processes. ``convolve`` runs a small 3D convolution network like the tokenizer's,
whose OpenMP threads spin at barriers for as long as the library chooses (``default``), briefly or not at all.

The busy processes run in their own session, because Linux's autogroup scheduling divides the cores among sessions first
and among threads only within a session. Every row shows how a worker spent its time: ``cpu_s`` computing, ``queue_s``
runnable but waiting for a core, and the rest of ``wall_s`` blocked (on the GIL, a lock or the disk).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
BUSY = 2
WORKERS = "a worker per core, 1 thread each"  # how latents are encoded and runs evaluated
GENERATE = {"1 thread": (ThreadPoolExecutor, 1), "2 threads": (ThreadPoolExecutor, 2), "2 processes": (None, 2)}
CONVOLVE: dict[str, tuple[int, dict[str, str]]] = {
    "1 thread": (1, {}),
    "2 threads, default": (2, {}),
    "2 threads, GOMP_SPINCOUNT=1000": (2, {"GOMP_SPINCOUNT": "1000"}),
    "2 threads, OMP_WAIT_POLICY=PASSIVE": (2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    WORKERS: (0, {}),
}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within the block, run ``count`` busy processes in their own session."""
    command = f"import os\nfor _ in range({count} - 1):\n    if not os.fork(): break\nwhile True: pass"
    leader = subprocess.Popen([sys.executable, "-c", command], start_new_session=True) if count else None
    try:
        yield
    finally:
        if leader:
            os.killpg(leader.pid, 9)
            leader.wait()


def one_flow(job: int, folder: str, snapshots: int) -> tuple[float, float, float]:
    """Make trajectory ``job``. Returns the seconds of wall time, of computing and of waiting for a core."""
    from shodh_moe.config.load import load_config
    from shodh_moe.data.generation import simulate_and_write
    from shodh_moe.data.planned import planned_trajectories

    config = load_config(CONFIG, [f"data.snapshots={snapshots}"]).data
    planned = planned_trajectories(config, Path(folder))[job]
    statistics_file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    before, began = statistics_file.read_text().split(), time.perf_counter()
    simulate_and_write(planned, config, cores=1)
    wall, after = time.perf_counter() - began, statistics_file.read_text().split()
    cpu, queue = ((int(after[n]) - int(before[n])) / 1e9 for n in (0, 1))
    return wall, cpu, queue


def generate(mode: str, busy: int, flows: int, snapshots: int) -> dict[str, float]:
    """Trajectories per minute, without start-up and compilation, and how the time of one was spent."""
    kind, workers = GENERATE[mode]
    pool: Executor = kind(workers) if kind else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool, tempfile.TemporaryDirectory() as folder:
        # Make both domains in every worker, so that imports and compiled kernels are loaded.
        warm = [pool.submit(one_flow, n % 2, tempfile.mkdtemp(dir=folder), 2) for n in range(2 * workers)]
        for future in warm:
            future.result()
        with busy_processes(busy):
            began = time.perf_counter()
            futures = [pool.submit(one_flow, job, folder, snapshots) for job in range(flows)]
            times = [future.result() for future in futures]
            passed = time.perf_counter() - began
    wall, cpu, queue = (statistics.mean(column) for column in zip(*times, strict=True))
    return {"per_minute": 60 * flows / passed, "wall_s": wall, "cpu_s": cpu, "queue_s": queue}


def convolve(mode: str, busy: int, seconds: float) -> dict[str, float]:
    """Network evaluations per minute, in a new process, because OpenMP reads its settings only once."""
    threads, settings = CONVOLVE[mode]
    command = [sys.executable, __file__, "--convolve", str(threads), "--seconds", str(seconds)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with busy_processes(busy):
        done = subprocess.run(command, env=environment | settings, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def convolutions(threads: int, seconds: float) -> dict[str, float]:
    """Evaluate the network for this long in this process, with 0 threads in `map_in_threads`. Returns the row of
    `convolve`.
    """
    import torch
    from torch import nn

    from shodh_moe.base.threads import map_in_threads

    torch.set_num_threads(max(threads, 1))
    layers = nn.Conv3d(4, 32, 3, padding=1), nn.GELU(), nn.Conv3d(32, 32, 3, padding=1), nn.GELU(), nn.Conv3d(32, 64, 4)
    network, fields = nn.Sequential(*layers), torch.randn(2, 4, 32, 32, 32)
    with torch.no_grad():
        network(fields)
        count, began, cpu = 0, time.perf_counter(), time.process_time()
        endless = iter(lambda: fields, None)
        for _ in map(network, endless) if threads else map_in_threads(network, endless, bytes_per_item=1):
            count += 1
            if (passed := time.perf_counter() - began) >= seconds:
                break
    used = time.process_time() - cpu
    return {"per_minute": 60 * count / passed, "wall_s": passed / count, "cpu_s": used / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each mode; default: %(default)s")
    parser.add_argument("--flows", type=int, default=8, help="trajectories per measurement; default: %(default)s")
    parser.add_argument("--snapshots", type=int, default=8, help="snapshots per trajectory; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of convolutions; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here; default: print it")
    parser.add_argument("--convolve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convolve is not None:
        print(json.dumps(convolutions(options.convolve, options.seconds)))
        return
    rows: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for busy in (0, BUSY):
            for mode in GENERATE:
                row = generate(mode, busy, options.flows, options.snapshots)
                rows.setdefault(("generate", mode, busy), []).append(row)
            for mode in CONVOLVE:
                rows.setdefault(("convolve", mode, busy), []).append(convolve(mode, busy, options.seconds))
    result: dict[str, Any] = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "rounds": options.rounds}
    for (work, mode, busy), measured in rows.items():
        case = "beside two busy processes" if busy else "alone"
        medians = {key: round(statistics.median(one[key] for one in measured), 4) for key in measured[0]}
        result.setdefault(work, {}).setdefault(mode, {})[case] = medians
    text = json.dumps(result, indent=2) + "\n"
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
