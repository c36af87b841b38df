"""The training loop that every rank runs: optimizer steps, records, checkpoints, stop signals and resuming.

A `Task` defines what is trained: it owns the engine with the network, and provides the batches and losses.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
import uuid
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from shodh_moe.base.errors import EXIT_REQUEUE
from shodh_moe.base.progress import progress
from shodh_moe.checkpoint import CheckpointReader, CheckpointWriter
from shodh_moe.config import Config, RunConfig, TrainingConfig
from shodh_moe.kernels.backend import describe
from shodh_moe.launching.sentinel import clear
from shodh_moe.launching.stop_signals import stop_request
from shodh_moe.launching.watchdog import Watchdog
from shodh_moe.parallel.rendezvous import versions
from shodh_moe.training.engine import Step
from shodh_moe.training.interval import Interval
from shodh_moe.training.lock import lock_run
from shodh_moe.training.log import Log
from shodh_moe.training.process_group import leave_process_group
from shodh_moe.training.resume import load_initial_weights, on_rank_0, random_state, restore_checkpoint
from shodh_moe.training.task import Task


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to ``min_learning_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def train(task: Task, config: RunConfig, run: Path, resume: str = "auto", watchdog: Watchdog | None = None) -> None:
    """Train to ``training.steps``, then leave the process group that `init_distributed` joined.

    However the training ends, the log is closed, the watchdog stopped, the run folder unlocked and the process group
    left, so that the same process can start another training.

    Args:
        resume: ``auto`` resumes from the newest intact checkpoint of the run folder, if there is one; a checkpoint
            folder resumes from that one.
        watchdog: watches this rank since it started, and is stopped here; None: a new one watches the training.

    Raises:
        UserError: no checkpoint fits, a step was not finite under the policy ``halt``, or another process trains in
            the run folder.
        SystemExit: with `EXIT_REQUEUE`, after a stop signal and a checkpoint.
    """
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", 0))
    with ExitStack() as resources:
        resources.push(_leave_process_group)
        on_rank_0(lambda: resources.enter_context(lock_run(run)), share=False)
        attempt = on_rank_0(lambda: _begin_attempt(run, watchdog))
        stop_requests = resources.enter_context(stop_request())
        watchdog = watchdog or Watchdog(run, rank, local_rank, attempt, config.training.stall_seconds)
        resources.callback(watchdog.stop)
        watchdog.accept_stops()

        start = _restore(task, config, run / "checkpoints", resume)
        writer = _checkpoint_writer(run / "checkpoints", config.training, attempt)
        telemetry = config.telemetry if isinstance(config, Config) else None
        log = resources.enter_context(Log(run, start.step, telemetry)) if rank == 0 else None
        if rank == 0:
            _announce(task, config, start)
        step, stopped = Loop(task, config, start, writer, log, watchdog, stop_requests).run()
        if log:
            log.close(finished=not stopped)
        dist.barrier()
    if stopped:
        if rank == 0:
            print(f"stopped by a signal after step {step}: the same command resumes from there", flush=True)
        raise SystemExit(EXIT_REQUEUE)


def _begin_attempt(run: Path, watchdog: Watchdog | None) -> str:
    """Return what identifies this start of the run, after removing what earlier ones have left."""
    attempt = watchdog.attempt if watchdog else uuid.uuid4().hex
    clear(run, attempt)
    return attempt


def _leave_process_group(
    kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
) -> None:
    with suppress(Exception) if error else nullcontext():  # a second error must not hide the first
        leave_process_group(failed=error is not None)


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        step: number of steps already made.
        checkpoint: {path, step, world_size, start} of the checkpoint that it resumes from, None for a new run.
        origin: {path, step, sha256} of the weights that the run began with, None if it began from scratch.
        interval: sums since the last train record.
    """

    step: int
    checkpoint: dict[str, Any] | None
    origin: dict[str, Any] | None
    interval: Interval


def _restore(task: Task, config: RunConfig, checkpoints: Path, resume: str) -> Start:
    """Load the checkpoint to resume from, or the weights that ``start`` names (collective)."""
    found, state = restore_checkpoint(checkpoints, resume, task)
    origin = found["start"] if found else load_initial_weights(Path(config.start), task) if config.start else None
    interval = Interval()
    interval.load_state(state)
    task.load_state(state)
    return Start(found["step"] if found else 0, found, origin, interval)


def _checkpoint_writer(checkpoints: Path, t: TrainingConfig, attempt: str) -> CheckpointWriter:
    return CheckpointWriter(checkpoints, dist.get_rank(), dist.get_world_size(), t.keep_last, t.keep_every, attempt)


def _announce(task: Task, config: RunConfig, start: Start) -> None:
    """Print where the run starts, its layout, its kernels, and what changed since the checkpoint."""
    engine, world, found = task.engine, dist.get_world_size(), start.checkpoint
    if found:
        where = f"from step {start.step} of {found['path']}"
    elif start.origin:
        where = f"with the weights of {start.origin['path']}"
    else:
        where = "from scratch"
    layout = f"{world} ranks, EP {engine.ep.size}, ZeRO {config.parallel.zero_stage}"
    layout += f", {config.training.precision}" + (f", CP {engine.cp.size}" if engine.cp.size > 1 else "")
    print(f"{task.name} {where}: {layout}, device {engine.device}", flush=True)
    print(f"kernels: {describe(engine.device)}; AdamW: {engine.optimizer_name}; norms: {engine.norm}", flush=True)
    if not found:
        return
    saved = CheckpointReader(Path(found["path"])).state["config"]
    before, now = (found["world_size"], saved.get("parallel", {}).get("context_size", 1)), (world, engine.cp.size)
    if before != now:
        global_batch = saved["training"]["batch_size"] * before[0] // before[1]
        changes = global_batch != config.training.batch_size * engine.layout.batches
        batch = ": the global batch changes with them" if changes else ""
        print(f"the checkpoint was made by {_size(*before, unit=' ranks')}, now {_size(*now)}{batch}", flush=True)


def _size(world: int, context_size: int, unit: str = "") -> str:
    return f"{world}{unit}" + (f" at CP {context_size}" if context_size > 1 else "")


@dataclass
class Loop:
    """The steps of one training, from ``start`` to the last one or to a stop signal."""

    task: Task
    config: RunConfig
    start: Start
    writer: CheckpointWriter
    log: Log | None  # on rank 0
    watchdog: Watchdog
    stop_requests: list[bool]

    def run(self) -> tuple[int, bool]:
        """Train, then finish the task. Returns the last step made, and whether a signal stopped the run."""
        t, done, stopped = self.config.training, self.start.step, False
        steps = range(done, t.steps)
        self.watchdog.alive()
        for step in progress(steps, self.task.name, len(steps)) if self.log else steps:
            done = step + 1
            result = self.make_step(step)
            if self._due(done, t.log_every) and self.start.interval.times:
                self.write_train_record(done, result)
            if self._due(done, t.validate_every):
                self._write({"kind": "valid", "step": done, **self.task.validate()})
            self.writer.check()
            self.watchdog.alive()
            stopped = result.stop and done < t.steps
            if self._due(done, t.checkpoint_every) or stopped:
                # A stop must not change what comes after it, so then the experts stay where they are.
                self._save(done, self._due(done, t.checkpoint_every))
            if stopped:
                break
        self.writer.finish()
        return done, stopped or not self.task.finish(self._keep_going)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.training.steps

    def make_step(self, step: int) -> Step:
        """Make one optimizer step from ``training.accumulation`` micro-batches."""
        began = time.perf_counter()
        t, task, interval, done = self.config.training, self.task, self.start.interval, step + 1
        task.begin(done, self._due(done, t.log_every))
        batches = []
        for micro_batch in range(step * t.accumulation, done * t.accumulation):
            losses = task.losses(micro_batch)
            result = task.engine.step(losses["loss"], learning_rate(step, t), bool(self.stop_requests))
            batches.append({key: value.detach() for key, value in losses.items()})
        assert result is not None  # `Engine.step` returns one after the last micro-batch
        task.end(done, result.applied)
        if result.applied:
            for losses in batches:
                interval.add(losses)
            interval.times.append(time.perf_counter() - began)
        else:
            interval.skipped += 1
        return result

    def write_train_record(self, done: int, result: Step) -> None:
        """Write a record of the steps since the last one (collective); ``result`` is that of step ``done``."""
        t, task, interval = self.config.training, self.task, self.start.interval
        seconds = statistics.median(interval.times)
        record = {
            "kind": "train",
            "step": done,
            **_mean_over_ranks(interval),
            "learning_rate": learning_rate(done - 1, t),
            "grad_norm": result.norm,
            "grad_norm_shared": result.shared_norm,
            "step_ms": seconds * 1e3,
            "tokens_per_second": task.tokens * dist.get_world_size() * t.accumulation / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "ep_size": task.engine.ep.size,
            "skipped_steps": interval.skipped,
            **task.record(done, result),
        }
        self._write(record)
        interval.clear()

    def _write(self, record: dict[str, Any]) -> None:
        if self.log:
            self.log.write(record)

    def _save(self, done: int, may_move_experts: bool) -> None:
        """Write a checkpoint in the background. If experts move to other ranks, wait for it and load it."""
        config, t, task, engine = self.config, self.config.training, self.task, self.task.engine
        placement = engine.next_placement() if may_move_experts else engine.ep.placement
        facts = {
            "config": config.model_dump(),
            "ep_size": engine.ep.size,
            "zero_stage": config.parallel.zero_stage,
            "updates": engine.updates,
            "learning_rate": learning_rate(done - 1, t),
            # The sampler is a function of these and the step.
            "sampler": {"seed": config.seed, "batch_size": t.batch_size, "accumulation": t.accumulation},
            "versions": versions(),
            "start": self.start.origin,
            "inputs": task.inputs,
            **({"placement": placement} if placement else {}),
            **task.facts,
        }
        rank_state = random_state() | self.start.interval.state() | task.state()
        self.writer.save(done, engine.fragments(), engine.shapes(), rank_state, facts)
        if placement != engine.ep.placement and done < t.steps:
            self.writer.finish()
            engine.load(CheckpointReader(self.writer.path(done)))
            if self.log:
                print(f"step {done}: experts have moved to balance the load of the ranks", flush=True)

    def _keep_going(self) -> bool:
        """Return whether no rank was asked to stop (collective)."""
        self.watchdog.alive()
        stops = torch.tensor(float(bool(self.stop_requests)), device=self.task.engine.device)
        dist.all_reduce(stops)
        return not stops


def peak_memory_bytes() -> int:
    """Return this rank's peak memory in bytes: allocated device memory on a GPU, else the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mean_over_ranks(interval: Interval) -> dict[str, float]:
    """Return the interval's mean losses over all ranks, by name (collective)."""
    values = interval.means()
    dist.all_reduce(values)
    return dict(zip(interval.sums, (values / dist.get_world_size()).tolist(), strict=True))
