"""Generate a dataset folder: simulate what is missing, then compute the statistics of its training split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.progress import progress as default_progress
from shodh_moe.config import DataConfig
from shodh_moe.data.estimate import told, update_rate, worth_measuring
from shodh_moe.data.listing import list_trajectories
from shodh_moe.data.planned import PlannedTrajectory, is_done, plan, unfinished
from shodh_moe.data.stats import STATS_FILE, stats_of_files, write_stats
from shodh_moe.data.summary import summarise
from shodh_moe.data.well import write_trajectory
from shodh_moe.solvers import simulate

Progress = Callable[..., Iterator[Any]]
# From this size on one flow keeps all cores busy; below, cores do better with a flow each.
_PARALLEL_CELLS = 96**3


def generate(config: DataConfig, folder: Path, progress: Progress = default_progress) -> Path:
    """Make ``<folder>/data/{train,valid,test}/<domain>_<index>.hdf5``, ``stats.yaml`` and ``dataset.yaml`` there.

    Returns ``folder``. What it will take is printed first, what there is at the end.

    Complete files that the same request made are kept, so a killed run goes on where it was. ``progress`` is called
    as ``progress(iterable, desc, total)`` and must yield the items. Others may work in the same folder at the same
    time: each file is made whole beside its place, and nobody begins one that is there.

    Raises:
        UserError: the disk is too small or not writable, a flow diverged, or the folder holds other data.
    """
    folder = Path(folder)
    jobs = unfinished(config, folder)
    if jobs:
        print(f"[data] {estimate(jobs, config, folder, own_cores())}", flush=True)
    make(jobs, config, progress)
    records = list_trajectories(folder, "train", config.grid)
    write_stats(folder, stats_of_files(records, min(own_cores(), 16), progress))
    for line in summarise(folder, config, [(job.domain, job.path) for job in plan(config, folder)]):
        print(f"[data] {line}", flush=True)
    return folder


def estimate(
    jobs: list[PlannedTrajectory], config: DataConfig, folder: Path, cores: int, local_rank: int | None = None
) -> str:
    """What it will take this process to make ``jobs``, as a line; measures for a second unless they are few."""
    devices = flow_devices(config, cores, local_rank)
    rate = update_rate(config, len(devices), cores) if worth_measuring(jobs, config, devices) else None
    where = on_devices(len(set(devices)) if devices[0] != "cpu" else 0, cores)
    return told(jobs, len(plan(config, folder)), config, folder, len(devices), rate, where)


def on_devices(gpus: int, cores: int) -> str:
    """``on these 2 cores``, or on so many GPUs."""
    count, name = (gpus, "GPU") if gpus else (cores, "core")
    return f"on this {name}" if count == 1 else f"on these {count} {name}s"


def make(
    jobs: list[PlannedTrajectory],
    config: DataConfig,
    progress: Progress = default_progress,
    local_rank: int | None = None,
) -> None:
    """Simulate and write ``jobs`` on all cores, or GPUs, of this process. Raises `UserError` as `generate` does."""
    if not jobs:
        return
    cores = own_cores()
    devices = flow_devices(config, cores, local_rank)
    if len(devices) == 1:
        _drain(progress((run(job, config, cores, devices[0]) for job in jobs), "simulating", len(jobs)))
        return
    work = on_free_device(lambda job, device: run(job, config, cores, device), devices)
    # The solver releases the GIL: threads are enough, and each flow has one core to itself.
    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            _drain(progress((future.result() for future in as_completed(futures)), "simulating", len(jobs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def on_free_device(work: Callable[[Any, str], Path], devices: list[str]) -> Callable[[Any], Path]:
    """``work(job, device)`` as a function of the job alone, for as many threads as there are devices."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def with_device(job: Any) -> Path:
        device = free.get()
        try:
            return work(job, device)
        finally:
            free.put(device)

    return with_device


def flow_devices(config: DataConfig, cores: int, local_rank: int | None = None) -> list[str]:
    """The devices of the flows that one process simulates at a time: ``cpu`` for each, or every GPU once.

    Args:
        local_rank: of a process that shares the GPUs of its host with others, and takes one of them.

    Raises:
        UserError: data.device asks for a GPU and there is none.
    """
    wanted = config.device
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not gpus:
        raise UserError("data.device is cuda, but there is no GPU here that torch can use: set it to auto or cpu")
    if not gpus:
        return ["cpu"] * simulation_threads(config, cores)
    return [f"cuda:{n}" for n in range(gpus)] if local_rank is None else [f"cuda:{local_rank % gpus}"]


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


def run(job: PlannedTrajectory, config: DataConfig, cores: int, device: str = "cpu") -> Path:
    """Simulate one trajectory and write it, unless someone else has meanwhile; a large flow on ``cores`` cores.

    ``device`` is ``cpu`` or a GPU such as ``cuda:1``.

    Returns where it is.

    Raises:
        UserError: the disk is full or not writable, or the flow diverged.
    """
    if is_done(job):
        return job.path
    if _is_large(config):
        numba.set_num_threads(min(cores, numba.config.NUMBA_NUM_THREADS))
    grid = (config.grid[0], config.grid[1], config.grid[2])
    arguments = (job.domain, job.config, grid, config.seed, job.trajectory, config.snapshots)
    if device == "cpu":
        simulation = simulate(*arguments, parallel=_is_large(config))
    else:
        with torch.cuda.device(device):  # of this thread
            simulation = simulate(*arguments, device="cuda")
    provenance = {
        "solver": "D3Q19 lattice Boltzmann, two relaxation times",
        "device": device.partition(":")[0],
        "request": job.request,
        "parameters": simulation.parameters,
        "seed": config.seed,
        "trajectory": job.trajectory,
        "package_version": _package_version(),
        "reynolds": simulation.parameters["reynolds"],
        "mach": simulation.parameters["mach"],
    }
    write_trajectory(
        job.path,
        simulation,
        dataset_name=config.name,
        domain=job.domain,
        provenance=provenance,
        compression=config.compression,
    )
    return job.path


def is_complete(config: DataConfig, folder: Path) -> bool:
    """Whether every file of this config is there and whole, by its header, and so are the statistics."""
    return (folder / STATS_FILE).exists() and all(is_done(job) for job in plan(config, folder))


def _package_version() -> str:
    try:
        return version("shodh_moe")
    except PackageNotFoundError:
        return "not installed"
