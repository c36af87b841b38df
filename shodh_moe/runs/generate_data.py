"""Generate a dataset with one process, with several independent processes, or with MPI.

``mpirun`` shares the trajectories among its ranks. ``--part I --of N`` generates one part of them, for job arrays;
``srun`` with several tasks does the same. The process that finds all trajectories complete writes the statistics.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from shodh_moe.base.command import OneLineParser, add_config_arguments, exit_code
from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import EXIT_REQUEUE, UserError
from shodh_moe.base.lock import making
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.polling import wait_until
from shodh_moe.base.progress import progress
from shodh_moe.base.variables import number, number_in
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.data.estimate import format_estimate, update_rate, worth_measuring
from shodh_moe.data.generation import (
    devices_phrase,
    estimate,
    flow_devices,
    on_free_device,
    simulate_all,
    simulate_and_write,
)
from shodh_moe.data.mpi_jobs import cores_of_rank, share_jobs
from shodh_moe.data.planned import PlannedTrajectory, missing, planned_trajectories, require_space, unfinished
from shodh_moe.launching.mpi import in_slurm_step, mpi_rank, mpi_size, mpi_world
from shodh_moe.launching.stop_signals import stop_signals
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
        description="Generate the missing trajectories of a config's dataset, then its statistics.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--part", type=int, help="generate only this part of the trajectories, counted from 0; needs --of"
    )
    parser.add_argument("--of", type=int, help="the number of parts")
    parser.add_argument(
        "--estimate", action="store_true", help="print the estimated time and disk space, and generate nothing"
    )
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
        code = exit_code(work, options.debug, goes_on=mpi_size() > 1)  # the other processes would wait for this one
    if world and code:
        # The other ranks would wait for this one forever.
        world.Abort(code)
    return code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block, a scheduler's signal ends the process at once with `EXIT_REQUEUE`.

    A thread waits for the signals, as Python's own handlers do not run while the main thread is in compiled code.
    """
    handled = stop_signals()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in handled:
                if mpi_rank() == 0:
                    print(
                        "stopped by a signal: run the same command to resume from the finished trajectories", flush=True
                    )
                os._exit(EXIT_REQUEUE)

    before = {number: signal.signal(number, lambda *_: None) for number in handled}
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
    """The requested part as (part, of); (0, 1) means everything."""
    part, of = options.part, options.of
    if (part is None) != (of is None):
        raise UserError("--part and --of belong together: --part 0 --of 4 makes the first quarter")
    if part is not None:
        if not 0 <= part < of:
            raise UserError(f"--part {part} --of {of}: parts are numbered from 0 to {max(of, 1) - 1}")
        return part, of
    if mpi_size() == 1 and in_slurm_step():
        return number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS", least=1)
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
            # Do not infer a part: the tasks of an array may use different configs.
            print(
                "note: this task of a job array generates every trajectory; use --part and --of to share them",
                flush=True,
            )
        pipeline.make_data(config, paths)
        return
    with _sharing(config, paths.dataset):
        jobs = _jobs(config, paths.dataset, part, of)
        print(f"[data] part {part} of {of}, counted from 0: {len(jobs)} trajectories to generate", flush=True)
        if jobs:
            expected = estimate(jobs, config.data, paths.dataset, available_cores(), _task_of_host())
            print(f"[data] {expected}", flush=True)
        simulate_all(jobs, config.data, local_rank=_task_of_host())
    _finish(config, paths)


def _sharing(config: Config, dataset: Path) -> AbstractContextManager[None]:
    """Within the block, other parts may generate the same dataset, but commands that generate all of it wait."""
    return nullcontext() if config.data.path else making(dataset, "data", config.name, shared=True)


def _task_of_host() -> int | None:
    """Number of this ``srun`` task on its host; None if there is only one task."""
    several = in_slurm_step() and (number_in("SLURM_STEP_NUM_TASKS") or 1) > 1
    return (number_in("SLURM_LOCALID") or 0) if several else None


def _estimate_only(config: Config, dataset: Path, part: int, of: int) -> None:
    """Print the estimate for the missing trajectories; then raise `UserError` if the disk is too small."""
    if config.data.path:
        raise UserError("--estimate is for generated data, but data.path names an existing folder: set it to null")
    jobs = unfinished(config.data, dataset, part, of, begin=False)
    if not jobs:
        print("[data] nothing is left to generate", flush=True)
        return
    print(f"[data] {estimate(jobs, config.data, dataset, available_cores(), _task_of_host())}", flush=True)
    require_space(dataset, len(jobs), config.data)


def _generate_on_ranks(world: Any, options: argparse.Namespace, part: int, of: int) -> None:
    """Generate with MPI. Only rank 0 reads the config and the folder, so that errors are reported once."""
    found: tuple[Config, Paths, list[PlannedTrajectory]] | None = None
    with ExitStack() as stack:
        if world.rank == 0:
            if options.estimate:
                raise UserError("--estimate is for one process: leave out mpirun")
            config, paths = _config(options)
            flow_devices(config.data, 1, 0)  # report a missing GPU once
            stack.enter_context(_sharing(config, paths.dataset))
            found = config, paths, _jobs(config, paths.dataset, part, of)
            print(f"[data] {world.size} ranks, {len(found[2])} trajectories to generate", flush=True)
        config, paths, jobs = world.bcast(found)
        cores, number = cores_of_rank(world)
        devices = flow_devices(config.data, cores, number)
        if jobs:
            _print_estimate(world, jobs, config, paths.dataset, devices, cores)
            work = on_free_device(
                lambda job, device: simulate_and_write(jobs[job], config.data, cores, device), devices
            )
            ends = share_jobs(world, work, len(jobs), len(devices))
            for _ in progress(ends, "simulating", len(jobs)) if world.rank == 0 else ends:
                pass
    if world.rank == 0:
        if not wait_until(lambda: not missing(jobs), _VISIBLE_S):
            unseen = missing(jobs)
            raise UserError(
                f"{len(unseen)} files written by other ranks are not visible here ({unseen[0].path}, ...): "
                "put data.root on a disk that all hosts share"
            )
        _finish(config, paths)


def _print_estimate(
    world: Any, jobs: list[PlannedTrajectory], config: Config, dataset: Path, devices: list[str], cores: int
) -> None:
    """Print the estimate. All ranks measure at the same time, as they will also work together (collective)."""
    # Hosts may differ in their GPUs: either all ranks measure or none.
    everywhere = all(world.allgather(worth_measuring(jobs, config.data, devices)))
    rates = world.gather(update_rate(config.data, len(devices), cores) if everywhere else 0.0)
    flows, all_cores, gpus = (world.gather(n) for n in (len(devices), cores, int(devices[0] != "cpu")))
    if world.rank == 0:
        where = devices_phrase(sum(gpus), sum(all_cores))
        all_jobs = len(planned_trajectories(config.data, dataset))
        print(
            f"[data] {format_estimate(jobs, all_jobs, config.data, dataset, sum(flows), sum(rates), where)}", flush=True
        )


def _jobs(config: Config, dataset: Path, part: int, of: int) -> list[PlannedTrajectory]:
    return [] if config.data.path else unfinished(config.data, dataset, part, of)


def _finish(config: Config, paths: Paths) -> None:
    """Write statistics and manifest once all trajectories exist. Concurrent processes write identical files."""
    everything = [] if config.data.path else planned_trajectories(config.data, paths.dataset)
    if left := missing(everything):
        print(
            f"[data] {len(left)} of {len(everything)} trajectories are still missing: the part that finishes last "
            "writes the statistics; to finish a killed part, run its command again",
            flush=True,
        )
        return
    pipeline.make_data(config, paths)
