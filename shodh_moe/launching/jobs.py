"""Jobs of a benchmark or audit: several processes at once, each on its share of the machine, with their run times."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import EXIT_REQUEUE, UserError
from shodh_moe.base.files import write_text
from shodh_moe.base.network import free_port
from shodh_moe.launching.devices import environment_of_each_gpu
from shodh_moe.launching.rank_variables import WATCH_PARENT
from shodh_moe.launching.stop_signals import on_stop_signals


@dataclass(frozen=True)
class ProcessJob:
    """One Python process.

    Attributes:
        name: label for its output and run time.
        arguments: arguments of the interpreter.
        log: file for its output.
        cost: JSON file with its CPU and wall time in seconds, summed over all its starts.
        excused: called if it ends with an error; returns whether that is a valid result, so that other jobs continue.
    """

    name: str
    arguments: list[str]
    log: Path
    cost: Path
    excused: Callable[[], bool] = lambda: False


@dataclass
class _Progress:
    """State shared by the jobs of one call.

    Attributes:
        failed: error messages.
        stops: set once this process was asked to stop.
        running: process IDs.
    """

    at_once: int
    failed: list[str] = field(default_factory=list)
    stops: bool = False
    running: set[int] = field(default_factory=set)

    def stop(self) -> None:
        self.stops = True
        for number in tuple(self.running):
            self.end(number)

    def end(self, number: int) -> None:
        """Ask a process to end; a training writes a checkpoint first."""
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGTERM)


def resolve_jobs(jobs: int | str) -> int:
    """Return the number of processes to run at once; ``auto`` is one per GPU, or one per CPU core without GPUs."""
    if jobs != "auto":
        return int(jobs)
    return len(environment_of_each_gpu()) or available_cores()


def run_jobs(jobs: Sequence[ProcessJob], at_once: int, label: str = "bench") -> None:
    """Run all jobs. After a failure no more jobs are started, and the running ones finish.

    After SIGTERM, SIGUSR1 or SIGHUP the running jobs get SIGTERM, and no more jobs are started.

    Args:
        label: prefix of the lines about finished jobs.

    Raises:
        UserError: a job failed and is not excused; the message includes the end of its output.
        SystemExit: with `EXIT_REQUEUE`, after a signal.
    """
    places: queue.Queue[int] = queue.Queue()
    for place in range(at_once):
        places.put(place)
    progress = _Progress(at_once)

    def run(job: ProcessJob) -> float:
        place = places.get()
        try:
            return 0.0 if progress.failed or progress.stops else _run(job, place, progress)
        finally:
            places.put(place)

    with on_stop_signals(progress.stop), ThreadPoolExecutor(at_once) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        for number, future in enumerate(as_completed(waiting), start=1):
            seconds = future.result()
            if not progress.failed and not progress.stops:
                print(f"[{label}] {waiting[future].name}: {seconds:.0f} CPU s ({number} of {len(jobs)})", flush=True)
    if progress.stops:
        print(f"[{label}] stopped by a signal: the same command resumes from there", flush=True)
        raise SystemExit(EXIT_REQUEUE)
    if progress.failed:
        raise UserError(progress.failed[0])


def _run(job: ProcessJob, place: int, progress: _Progress) -> float:
    """Run a job, on GPU number ``place`` if there are GPUs; return its CPU time in seconds."""
    # Each job is a single rank, no matter what started this process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", WATCH_PARENT: "1"}
    environment = {**os.environ, **alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if gpus := environment_of_each_gpu():
        environment |= gpus[place % len(gpus)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // progress.at_once)))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(job.log, "ab") as log:
        process = subprocess.Popen([sys.executable, *job.arguments], env=environment, stdout=log, stderr=log)
        progress.running.add(process.pid)
        if progress.stops:  # the stop request may have come while this job was starting
            progress.end(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        progress.running.discard(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu, wall = usage.ru_utime + usage.ru_stime, time.perf_counter() - began
    before = read_cost(job.cost)
    cost = {"cpu_seconds": before["cpu_seconds"] + cpu, "seconds": before["seconds"] + wall}
    write_text(job.cost, json.dumps(cost) + "\n")
    if process.returncode and not progress.stops and not job.excused():
        lines = job.log.read_text(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "")
        progress.failed.append(f"{job.name} ended with code {process.returncode}: {reason} (full output: {job.log})")
    return cpu


def read_cost(path: Path) -> dict[str, float]:
    """Read the run times that `run_jobs` has written; zeros if there are none yet."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {"cpu_seconds": 0.0, "seconds": 0.0}
