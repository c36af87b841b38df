"""Generate a dataset folder: simulate what is missing, then compute the statistics of its training split."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba
import numpy as np

from shodh_moe.config import DataConfig, DomainConfig
from shodh_moe.data.dataset import SPLITS, list_trajectories
from shodh_moe.data.reading import read_provenance, read_trajectory
from shodh_moe.data.stats import STATS_FILE, compute_stats, write_stats
from shodh_moe.data.well import write_trajectory
from shodh_moe.errors import UserError
from shodh_moe.files import remove_leftovers
from shodh_moe.progress import progress as default_progress
from shodh_moe.solvers import SOLVER_VERSION, SPLIT_BASE, simulate

Progress = Callable[..., Iterator[Any]]
# From this size on one flow keeps all cores busy; below, cores do better with a flow each.
_PARALLEL_CELLS = 96**3


@dataclass(frozen=True)
class Job:
    """One trajectory to be made: which one, where it goes and the request that identifies it."""

    path: Path
    domain: str
    config: DomainConfig
    trajectory: int
    request: dict[str, Any]


def plan(config: DataConfig, folder: Path) -> list[Job]:
    """Every trajectory that ``config`` asks for, domains interleaved."""
    jobs = []
    for split in SPLITS:
        domains = config.domains.items()
        most = max((getattr(domain.trajectories, split) for _, domain in domains), default=0)
        for index in range(most):
            for name, domain in domains:
                if index < getattr(domain.trajectories, split):
                    path = folder / "data" / split / f"{name}_{index:04d}.hdf5"
                    trajectory = SPLIT_BASE[split] + index
                    jobs.append(Job(path, name, domain, trajectory, _request(config, domain, trajectory)))
    return jobs


def generate(config: DataConfig, folder: Path, progress: Progress = default_progress) -> Path:
    """Make ``<folder>/data/{train,valid,test}/<domain>_<index>.hdf5`` and ``<folder>/stats.yaml``; returns ``folder``.

    Complete files that the same request made are kept, so a killed run goes on where it was. ``progress`` is called
    as ``progress(iterable, desc, total)`` and must yield the items. Others may work in the same folder at the same
    time: each file is made whole beside its place, and nobody begins one that is there.

    Raises:
        UserError: the disk is too small or not writable, a flow diverged, or the folder holds other data.
    """
    folder = Path(folder)
    make(unfinished(config, folder), config, progress)
    records = list_trajectories(folder, "train", config.grid)
    write_stats(folder, compute_stats(read_trajectory(r) for r in progress(records, "statistics", len(records))))
    return folder


def unfinished(config: DataConfig, folder: Path, part: int = 0, of: int = 1) -> list[Job]:
    """What is missing or damaged in part ``part`` (from 0) of ``of`` equal parts of the dataset.

    Raises:
        UserError: the config asks for nothing, the folder holds other data, or what all parts still lack does not fit
            on the disk.
    """
    jobs = plan(config, folder)
    if not jobs:
        raise UserError("data.domains names no domain: keep at least one")
    for split in SPLITS:
        remove_leftovers(folder / "data" / split)
    _require_no_others(folder, {job.path for job in jobs})
    left = missing(jobs)
    _require_space(folder, len(left), config)
    # Neighbours in the list are of different domains: a run of them is as much work as any other.
    mine = {job.path for job in jobs[part * len(jobs) // of : (part + 1) * len(jobs) // of]}
    return [job for job in left if job.path in mine]


def missing(jobs: list[Job]) -> list[Job]:
    """Those whose file is not there or not whole."""
    for folder in {job.path.parent for job in jobs}:
        with suppress(OSError):
            os.listdir(folder)  # network disks remember for a while that a single name was not there
    return [job for job in jobs if not is_done(job)]


def make(jobs: list[Job], config: DataConfig, progress: Progress = default_progress) -> None:
    """Simulate and write ``jobs`` on all cores of this process. Raises `UserError` as `generate` does."""
    if not jobs:
        return
    cores = own_cores()
    threads = simulation_threads(config, cores)
    if threads == 1:
        _drain(progress((run(job, config, cores) for job in jobs), "simulating", len(jobs)))
        return
    # The solver releases the GIL: threads are enough, and each flow has one core to itself.
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run, job, config, cores) for job in jobs]
        try:
            _drain(progress((future.result() for future in as_completed(futures)), "simulating", len(jobs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def own_cores() -> int:
    """Cores that this process may use, as the system or SLURM says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Not every SLURM binds its tasks to the cores that it gives them.
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores


def simulation_threads(config: DataConfig, cores: int) -> int:
    """How many flows to simulate side by side on so many cores: one, if it is large enough to keep all of them busy."""
    return 1 if _is_large(config) else min(cores, 16)


def _is_large(config: DataConfig) -> bool:
    return int(np.prod(config.grid)) >= _PARALLEL_CELLS


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def run(job: Job, config: DataConfig, cores: int) -> Path:
    """Simulate one trajectory and write it, unless someone else has meanwhile; a large flow on ``cores`` cores.

    Returns where it is.

    Raises:
        UserError: the disk is full or not writable, or the flow diverged.
    """
    if is_done(job):
        return job.path
    if _is_large(config):
        numba.set_num_threads(min(cores, numba.config.NUMBA_NUM_THREADS))
    grid = (config.grid[0], config.grid[1], config.grid[2])
    simulation = simulate(
        job.domain,
        job.config,
        grid,
        config.seed,
        job.trajectory,
        config.snapshots,
        parallel=_is_large(config),
    )
    provenance = {
        "solver": "D3Q19 lattice Boltzmann, two relaxation times",
        "request": job.request,
        "parameters": simulation.parameters,
        "seed": config.seed,
        "trajectory": job.trajectory,
        "package_version": _package_version(),
        "reynolds": simulation.parameters["reynolds"],
        "mach": simulation.parameters["mach"],
    }
    write_trajectory(job.path, simulation, dataset_name=config.name, domain=job.domain, provenance=provenance)
    return job.path


def _request(config: DataConfig, domain: DomainConfig, trajectory: int) -> dict[str, Any]:
    # All that the bits of a trajectory depend on; how many others there are is not part of it.
    return {
        "solver_version": SOLVER_VERSION,
        "name": config.name,
        "grid": list(config.grid),
        "snapshots": config.snapshots,
        "seed": config.seed,
        "trajectory": trajectory,
        "domain": domain.model_dump(mode="json", exclude={"trajectories"}),
    }


def is_complete(config: DataConfig, folder: Path) -> bool:
    """Whether every file of this config is there and whole, by its header, and so are the statistics."""
    return (folder / STATS_FILE).exists() and all(is_done(job) for job in plan(config, folder))


def is_done(job: Job) -> bool:
    """Whether the file is there, whole by its header, and made by the same request."""
    if not job.path.exists():
        return False
    try:
        return read_provenance(job.path).get("request") == job.request
    except UserError:
        # Damaged: make it again.
        return False


def _require_no_others(folder: Path, wanted: set[Path]) -> None:
    others = [
        path for split in SPLITS for path in sorted((folder / "data" / split).glob("*.h*5")) if path.name[0] != "."
    ]
    others = [path for path in others if path not in wanted]
    if others:
        raise UserError(
            f"{folder} holds {len(others)} files that this config does not ask for ({others[0].name}, ...): "
            "remove them or set another data.name"
        )


def _require_space(folder: Path, count: int, config: DataConfig) -> None:
    cells = int(np.prod(config.grid))
    # Velocity and pressure per snapshot, the mask once, float32; a little for headers and the statistics.
    needed = count * (4 * cells * (4 * config.snapshots + 1) + 2**17) + 2**20
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if count and needed > free:
        raise UserError(
            f"{count} trajectories need {needed / 1e9:.2f} GB but {existing} has {free / 1e9:.2f} GB free: "
            "choose another data.root, or fewer trajectories, snapshots or grid cells"
        )


def _package_version() -> str:
    try:
        return version("shodh_moe")
    except PackageNotFoundError:
        return "not installed"
