"""Estimate the time and disk space of data generation before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shodh_moe.config import DataConfig
from shodh_moe.data.planned import PlannedTrajectory
from shodh_moe.data.storage import free_bytes, needed_bytes
from shodh_moe.solvers.calibration import RUNS
from shodh_moe.solvers.domains import Domain
from shodh_moe.solvers.flow import FlowSetup
from shodh_moe.solvers.seeds import trajectory_seed
from shodh_moe.solvers.settling import STRESS_STEPS, settling

_SHORT = 3e8  # cell updates; fewer take a minute at most and are not worth a measurement
_SECONDS = 0.4  # length of the measurement
_EXAMPLE_SIZE = 64


def time_steps(domain: Domain, setup: FlowSetup, grid: Sequence[int], snapshots: int) -> int:
    """Number of solver time steps for one trajectory, including those before the first snapshot."""
    steps = domain.spinup_steps + (snapshots - 1) * domain.steps_per_snapshot
    if setup.velocity_3XYZ is not None:
        steps += settling(tuple(grid), setup.lid)[0] + STRESS_STEPS
    if setup.calibration:
        steps += RUNS * setup.calibration.steps
    return steps


def cell_updates(jobs: Sequence[PlannedTrajectory], config: DataConfig) -> float:
    """Number of fluid-cell updates that ``jobs`` need, estimated from the first flow of each domain."""
    cells = float(np.prod(config.grid))
    per_trajectory: dict[str, float] = {}
    for job in jobs:
        if job.domain not in per_trajectory:
            setup = _example(job, config)
            steps = time_steps(job.config, setup, config.grid, config.snapshots)
            per_trajectory[job.domain] = cells * float(1 - setup.solid_XYZ.mean()) * steps
    return sum(per_trajectory[job.domain] for job in jobs)


def _example(job: PlannedTrajectory, config: DataConfig) -> FlowSetup:
    """Set up a flow like that of ``job`` in a box of at most 64^3, because a larger one would take long."""
    rng = np.random.default_rng(trajectory_seed(config.seed, job.domain, job.trajectory))
    nx, ny, nz = (min(size, _EXAMPLE_SIZE) for size in config.grid)
    try:
        return job.config.setup((nx, ny, nz), rng)
    except ValueError:  # a geometry may fit only into the full-size box
        return FlowSetup(solid_XYZ=np.zeros((1, 1, 1), dtype=bool), lid=False, length=1.0)


def worth_measuring(jobs: Sequence[PlannedTrajectory], config: DataConfig, devices: Sequence[str]) -> bool:
    """Whether to call `update_rate`: only for more than a minute of work, and only on CPUs."""
    cells = float(np.prod(config.grid))
    stored = sum(config.snapshots * job.config.steps_per_snapshot for job in jobs) * cells
    return stored > _SHORT and set(devices) == {"cpu"}


def update_rate(config: DataConfig, flows: int, cores: int) -> float:
    """Measure how many cells this process updates per second with ``flows`` flows at a time; takes about a second.

    Uses a box of at most 64^3, or 48^3 for each of several flows; larger boxes are a little slower per cell.
    """
    import numba

    from shodh_moe.solvers import LatticeBoltzmann

    numba.set_num_threads(min(cores, numba.config.NUMBA_NUM_THREADS))
    shape = [min(size, 64 if flows == 1 else 48) for size in config.grid]
    none_3 = np.zeros((2, 3))

    def measured(_: int) -> float:
        solver = LatticeBoltzmann(np.zeros(shape, dtype=bool), 0.02, parallel=flows == 1 and cores > 1)
        solver.run(none_3)  # load the kernel and touch the memory
        steps, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < _SECONDS:
            solver.run(none_3)
            steps += len(none_3)
        return steps * solver.n_fluid / passed

    with ThreadPoolExecutor(flows) as pool:
        return sum(pool.map(measured, range(flows)))


def format_estimate(
    jobs: Sequence[PlannedTrajectory],
    of: int,
    config: DataConfig,
    folder: Path,
    flows: int,
    rate: float | None,
    where: str,
) -> str:
    """Format the estimate as one line.

    Args:
        jobs: the trajectories to generate now.
        of: number of trajectories in the whole dataset, including finished ones and other parts.
        flows: number of flows simulated at the same time by all processes.
        rate: cell updates per second of all processes; None if not measured.
        where: the hardware of the estimate, such as ``on these 2 cores``.
    """
    count = len(jobs)
    number = f"{count:,}" if count == of else f"{count:,} of {of:,}"
    sizes = [str(size) for size in config.grid]
    grid = f"{sizes[0]}^3" if len(set(sizes)) == 1 else "x".join(sizes)
    updates = cell_updates(jobs, config)
    if rate:
        # Some cores are idle in the last round.
        rounds = -(-count // flows) * flows / max(count, 1)
        hours = f"about {_duration(updates / rate * rounds)} {where}"
    else:
        hours = f"a minute or so {where}" if updates <= _SHORT else f"{where}: the progress will show how long"
    room = f"{_size(needed_bytes(count, config))} ({_size(free_bytes(folder))} free)"
    return f"{number} trajectories, {count * config.snapshots:,} snapshots of {grid}: {hours}, {room}"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "seconds"), (5400, 60, "minutes"), (72 * 3600, 3600, "hours")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 10 and unit > 1 else f"{value:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e6:.1f} MB"
