"""Generate a dataset: simulate the missing trajectories, then compute the statistics of the training split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import UserError
from shodh_moe.base.progress import progress as default_progress
from shodh_moe.config import DataConfig
from shodh_moe.data.estimate import format_estimate, update_rate, worth_measuring
from shodh_moe.data.listing import list_trajectories
from shodh_moe.data.planned import PlannedTrajectory, is_done, planned_trajectories, unfinished
from shodh_moe.data.stats import STATS_FILE, stats_of_files, write_stats
from shodh_moe.data.summary import summarise
from shodh_moe.data.well import write_trajectory
from shodh_moe.solvers import simulate

Progress = Callable[..., Iterator[Any]]
# A flow of at least this many cells uses all cores; smaller flows run side by side, one per core.
_PARALLEL_CELLS = 96**3


def generate(config: DataConfig, folder: Path, progress: Progress = default_progress) -> Path:
    """Write ``<folder>/data/{train,valid,test}/<domain>_<index>.hdf5``, ``stats.yaml`` and ``dataset.yaml``.

    Returns ``folder``. Prints an estimate of time and disk space first, and a summary of the dataset at the end.

    Complete files from the same request are kept, so a killed run can resume. ``progress`` is called as
    ``progress(iterable, desc, total)`` and must yield the items. Several processes may generate into the same folder:
    each file is written under a temporary name and renamed when complete, and existing files are skipped.

    Raises:
        UserError: the disk is too small or not writable, a flow diverged, or the folder holds other data.
    """
    folder = Path(folder)
    jobs = unfinished(config, folder)
    if jobs:
        print(f"[data] {estimate(jobs, config, folder, available_cores())}", flush=True)
    simulate_all(jobs, config, progress)
    records = list_trajectories(folder, "train", config.grid)
    write_stats(folder, stats_of_files(records, min(available_cores(), 16), progress))
    for line in summarise(folder, config, [(job.domain, job.path) for job in planned_trajectories(config, folder)]):
        print(f"[data] {line}", flush=True)
    return folder


def estimate(
    jobs: list[PlannedTrajectory], config: DataConfig, folder: Path, cores: int, local_rank: int | None = None
) -> str:
    """Estimate in one line the time and disk space of ``jobs`` here; measures for a second unless the work is small.

    Args:
        cores: number of cores of this process.
        local_rank: as in `flow_devices`.
    """
    devices = flow_devices(config, cores, local_rank)
    rate = update_rate(config, len(devices), cores) if worth_measuring(jobs, config, devices) else None
    where = devices_phrase(len(set(devices)) if devices[0] != "cpu" else 0, cores)
    return format_estimate(jobs, len(planned_trajectories(config, folder)), config, folder, len(devices), rate, where)


def devices_phrase(gpus: int, cores: int) -> str:
    """Name the hardware in a phrase such as ``on these 2 cores`` or ``on this GPU``."""
    count, name = (gpus, "GPU") if gpus else (cores, "core")
    return f"on this {name}" if count == 1 else f"on these {count} {name}s"


def simulate_all(
    jobs: list[PlannedTrajectory],
    config: DataConfig,
    progress: Progress = default_progress,
    local_rank: int | None = None,
) -> None:
    """Simulate and write ``jobs`` on all cores or GPUs of this process. Raises `UserError` like `generate`."""
    if not jobs:
        return
    cores = available_cores()
    devices = flow_devices(config, cores, local_rank)
    if len(devices) == 1:
        _drain(progress((simulate_and_write(job, config, cores, devices[0]) for job in jobs), "simulating", len(jobs)))
        return
    work = on_free_device(lambda job, device: simulate_and_write(job, config, cores, device), devices)
    # Threads are enough: the solver releases the GIL for nearly all of its time (benchmarks/busy_machine.py).
    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            _drain(progress((future.result() for future in as_completed(futures)), "simulating", len(jobs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def on_free_device(work: Callable[[Any, str], Path], devices: list[str]) -> Callable[[Any], Path]:
    """Wrap ``work(job, device)`` as a function of the job alone, which waits for a free device.

    Each entry of ``devices`` runs one job at a time, so call it from as many threads as there are entries.
    """
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
    """List the device of each flow that this process simulates at the same time: all ``cpu``, or every GPU once.

    Args:
        local_rank: number of this process on its host, if several processes share the GPUs; it then uses one GPU.

    Raises:
        UserError: data.device asks for a GPU and none is available.
    """
    wanted = config.device
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not gpus:
        raise UserError("data.device is cuda, but torch finds no usable GPU: set it to auto or cpu")
    if not gpus:
        return ["cpu"] * simulation_threads(config, cores)
    return [f"cuda:{n}" for n in range(gpus)] if local_rank is None else [f"cuda:{local_rank % gpus}"]


def simulation_threads(config: DataConfig, cores: int) -> int:
    """Number of flows to simulate at the same time: one if it is large enough to use all cores, else one per core."""
    return 1 if _is_large(config) else min(cores, 16)


def _is_large(config: DataConfig) -> bool:
    return int(np.prod(config.grid)) >= _PARALLEL_CELLS


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def simulate_and_write(job: PlannedTrajectory, config: DataConfig, cores: int, device: str = "cpu") -> Path:
    """Simulate one trajectory and write it, unless another process has already written it; return its path.

    Args:
        cores: threads for a large flow; a small one uses a single thread.
        device: ``cpu`` or a GPU such as ``cuda:1``.

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
        with torch.cuda.device(device):  # the current device is set per thread
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
    """Whether every file of this config exists and is complete (by its header), and the statistics exist."""
    return (folder / STATS_FILE).exists() and all(is_done(job) for job in planned_trajectories(config, folder))


def _package_version() -> str:
    try:
        return version("shodh_moe")
    except PackageNotFoundError:
        return "not installed"
