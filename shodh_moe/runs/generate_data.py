"""Generating a dataset with one process, with several that need not know of each other, or with MPI.

``mpirun`` shares the trajectories out over its ranks; ``--part I --of N`` makes one part of them, for job arrays; so
does ``srun`` with several tasks. Whoever finds all of them there at the end writes the statistics.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shodh_moe.base.command import OneLineParser, add_config_arguments, exit_code
from shodh_moe.base.errors import EXIT_REQUEUE, UserError
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.polling import wait_until
from shodh_moe.base.progress import progress
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.data.estimate import told, update_rate, worth_measuring
from shodh_moe.data.generate import estimate, flow_devices, make, on_devices, on_free_device, own_cores, run
from shodh_moe.data.planned import PlannedTrajectory, missing, plan, require_space, unfinished
from shodh_moe.data.sharing import place_of_rank, share_out
from shodh_moe.launching.mpi import in_slurm_step, mpi_rank, mpi_size, mpi_world
from shodh_moe.launching.stop_signals import SIGNALS
from shodh_moe.runs import pipeline

_VISIBLE_S = 60.0  # how long a network disk may take to show a file to other hosts

EXAMPLES = """\
examples:
  python launch/generate_data.py --config configs/quickstart.yaml
  python launch/generate_data.py --config configs/data/full.yaml --estimate
  mpirun -n 64 python launch/generate_data.py --config configs/quickstart.yaml
  python launch/generate_data.py --config configs/quickstart.yaml --part $SLURM_ARRAY_TASK_ID --of 16"""


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="generate_data.py",
        description="Generate the dataset of a config: what is missing, then its statistics.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--part", type=int, help="make this part of the trajectories only, from 0; needs --of")
    parser.add_argument("--of", type=int, help="the number of parts")
    parser.add_argument("--estimate", action="store_true", help="say what it would take, and make nothing")
    options = parser.parse_intermixed_args(arguments)
    world: Any = None

    def work() -> None:
        nonlocal world
        keep_freed_memory()
        part, of = _part(options)
        world = mpi_world() if mpi_size() > 1 else None
        if world:
            _generate_on_ranks(world, options, part, of)
        else:
            _generate_alone(options, part, of)

    with _ended_by_signals():
        code = exit_code(work, options.debug)
    if world and code:
        # The others wait for this rank, and would for ever.
        world.Abort(code)
    return code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block the signals of schedulers end the process at once with `EXIT_REQUEUE`.

    Also while the main thread computes, which keeps Python's own handlers waiting for as long.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in SIGNALS:
                if mpi_rank() == 0:
                    print("stopped by a signal: the same command goes on from the trajectories there are", flush=True)
                os._exit(EXIT_REQUEUE)

    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _part(options: argparse.Namespace) -> tuple[int, int]:
    """The part asked for, as (part, of); (0, 1) is everything."""
    part, of = options.part, options.of
    if (part is None) != (of is None):
        raise UserError("--part and --of belong together: --part 0 --of 4 makes the first quarter")
    if part is not None:
        if not 0 <= part < of:
            raise UserError(f"--part {part} --of {of}: parts are numbered from 0 to {max(of, 1) - 1}")
        return part, of
    if mpi_size() == 1 and in_slurm_step():
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def _config(options: argparse.Namespace) -> tuple[Config, Paths]:
    """Read and check the config; returns its folders with it."""
    config = load_config(options.config, options.overrides, options.name)
    paths = resolve_paths(config)
    pipeline.check(config, paths)
    return config, paths


def _generate_alone(options: argparse.Namespace, part: int, of: int) -> None:
    config, paths = _config(options)
    if options.estimate:
        _estimate_only(config, paths.dataset, part, of)
        return
    if of == 1:
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            # Not taken for a part: the tasks of an array may as well have a config each.
            print("note: one task of a job array makes every trajectory; --part and --of would share them", flush=True)
        pipeline.make_data(config, paths)
        return
    jobs = _jobs(config, paths.dataset, part, of)
    print(f"[data] part {part} of {of}, counted from 0: {len(jobs)} trajectories to make", flush=True)
    if jobs:
        print(f"[data] {estimate(jobs, config.data, paths.dataset, own_cores(), _task_of_host())}", flush=True)
    make(jobs, config.data, local_rank=_task_of_host())
    _finish(config, paths)


def _task_of_host() -> int | None:
    """Which of several tasks of ``srun`` on this host this is; None where there is one."""
    several = in_slurm_step() and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get("SLURM_LOCALID", "0")) if several else None


def _estimate_only(config: Config, dataset: Path, part: int, of: int) -> None:
    """What is still to be made, whether or not the disk has room; a disk that has none is refused after it."""
    if config.data.path:
        raise UserError("--estimate is for data that are generated, and data.path names a folder: set it to null")
    jobs = unfinished(config.data, dataset, part, of, begin=False)
    if not jobs:
        print("[data] nothing is left to be made", flush=True)
        return
    print(f"[data] {estimate(jobs, config.data, dataset, own_cores(), _task_of_host())}", flush=True)
    require_space(dataset, len(jobs), config.data)


def _generate_on_ranks(world: Any, options: argparse.Namespace, part: int, of: int) -> None:
    """Rank 0 alone reads the config and looks at the folder, so that what is wrong is told once."""
    found: tuple[Config, Paths, list[PlannedTrajectory]] | None = None
    if world.rank == 0:
        if options.estimate:
            raise UserError("--estimate is for one process: leave out mpirun")
        config, paths = _config(options)
        flow_devices(config.data, 1, 0)  # a GPU that is asked for and not there is told once
        jobs = _jobs(config, paths.dataset, part, of)
        found = config, paths, jobs
        print(f"[data] {world.size} ranks, {len(jobs)} trajectories to make", flush=True)
    config, paths, jobs = world.bcast(found)
    cores, number = place_of_rank(world)
    devices = flow_devices(config.data, cores, number)
    if jobs:
        _tell_estimate(world, jobs, config, paths.dataset, devices, cores)
        work = on_free_device(lambda job, device: run(jobs[job], config.data, cores, device), devices)
        ends = share_out(world, work, len(jobs), len(devices))
        for _ in progress(ends, "simulating", len(jobs)) if world.rank == 0 else ends:
            pass
    if world.rank == 0:
        if not wait_until(lambda: not missing(jobs), _VISIBLE_S):
            unseen = missing(jobs)
            raise UserError(
                f"{len(unseen)} of the files that other ranks wrote are not to be seen here ({unseen[0].path}, ...): "
                "put data.root on a disk that all hosts share"
            )
        _finish(config, paths)


def _tell_estimate(
    world: Any, jobs: list[PlannedTrajectory], config: Config, dataset: Path, devices: list[str], cores: int
) -> None:
    """Print the estimate; all ranks measure at the same time, as they will work at the same time (collective)."""
    # Ranks of a host without GPUs know nothing of the GPUs of another: all measure, or none.
    everywhere = all(world.allgather(worth_measuring(jobs, config.data, devices)))
    rates = world.gather(update_rate(config.data, len(devices), cores) if everywhere else 0.0)
    flows, all_cores, gpus = (world.gather(n) for n in (len(devices), cores, int(devices[0] != "cpu")))
    if world.rank == 0:
        where = on_devices(sum(gpus), sum(all_cores))
        all_jobs = len(plan(config.data, dataset))
        print(f"[data] {told(jobs, all_jobs, config.data, dataset, sum(flows), sum(rates), where)}", flush=True)


def _jobs(config: Config, dataset: Path, part: int, of: int) -> list[PlannedTrajectory]:
    return [] if config.data.path else unfinished(config.data, dataset, part, of)


def _finish(config: Config, paths: Paths) -> None:
    """Statistics and manifest, once every trajectory is there. Several that do it at once write the same."""
    everything = [] if config.data.path else plan(config.data, paths.dataset)
    if left := missing(everything):
        print(
            f"[data] {len(left)} of {len(everything)} trajectories are still missing: the part that ends last writes "
            "the statistics, and the same command makes what a killed part left",
            flush=True,
        )
        return
    pipeline.make_data(config, paths)
