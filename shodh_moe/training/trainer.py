"""The training loop that every rank runs, whatever is trained: steps, records, checkpoints, signals, and going on.

What is trained is a `Task`: it has the engine with the network, and knows its batches and losses.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.base.errors import EXIT_REQUEUE
from shodh_moe.base.progress import progress
from shodh_moe.checkpoint import CheckpointReader, CheckpointWriter
from shodh_moe.config import RunConfig, TrainingConfig
from shodh_moe.kernels.backend import describe
from shodh_moe.launching.stop_signals import stop_request
from shodh_moe.launching.watchdog import watched
from shodh_moe.parallel.rendezvous import versions
from shodh_moe.training.engine import Engine, Step
from shodh_moe.training.interval import Interval
from shodh_moe.training.lock import lock_run
from shodh_moe.training.log import Log
from shodh_moe.training.resume import on_rank_0, random_state, start_from, weights_from


class Task(Protocol):
    """One rank's part of what is trained. All ranks call everything in the same order.

    Attributes:
        engine: with the network.
        name: of the progress bar.
        tokens: of a micro-batch on this rank, for the speed that records tell; a network without tokens counts samples.
        facts: what a checkpoint keeps beside what the trainer does.
    """

    engine: Engine
    name: str
    tokens: int
    facts: dict[str, Any]

    def check_start(self, state: dict[str, Any]) -> str | None:
        """Why the weights of another run, with this ``state.json``, would mean something else here; None if not."""

    def begin(self, step: int, logs: bool) -> None:
        """Before the micro-batches of the step that ends as ``step``; ``logs``: a record will be written of it."""

    def losses(self, micro_batch: int) -> dict[str, Tensor]:
        """Forward pass of the micro-batch of that number, counted over the whole run; 0-d, ``loss`` is minimised."""

    def end(self, step: int, applied: bool) -> None:
        """After the step; one that was not applied had a loss or gradient that is not finite. Raises to stop."""

    def record(self, step: int, result: Step) -> dict[str, Any]:
        """What a train record has beside losses, norms and speed (collective)."""

    def validate(self) -> dict[str, Any]:
        """What a validation record has (collective)."""

    def state(self) -> dict[str, Tensor]:
        """What this rank sums up over steps, 1-D by name, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `state`; one that does not fit, or lacks something, leaves everything as it is."""

    def finish(self, go_on: Callable[[], bool]) -> bool:
        """After the last step, also where a run that goes on had none left (collective).

        Long work calls ``go_on`` now and then, on all ranks alike; where that says False, it returns False at once.
        """


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to ``min_learning_rate`` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def train(task: Task, config: RunConfig, run: Path, resume: str = "auto", stop_file: Path | None = None) -> None:
    """Train to ``training.steps``.

    Args:
        resume: ``auto`` goes on from the newest intact checkpoint of the run folder, if there is one; a checkpoint
            folder goes on from that one.
        stop_file: by which the launching process asks for an end (`sentinel`).

    Raises:
        UserError: nothing fits to resume from, a step was not finite under the policy ``halt``, or another process
            trains in the run folder.
        SystemExit: with `EXIT_REQUEUE`, after SIGTERM or SIGUSR1 and a checkpoint.
    """
    t, engine = config.training, task.engine
    rank, world = dist.get_rank(), dist.get_world_size()
    lock = on_rank_0(lambda: lock_run(run), tell=False)
    attempt = on_rank_0(lambda: uuid.uuid4().hex)  # tells this start of the run from all others
    guards = ExitStack()
    asked = guards.enter_context(stop_request())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    watchdog = guards.enter_context(watched(run, rank, local_rank, attempt, t.stall_seconds, stop_file))

    checkpoints = run / "checkpoints"
    found, state = start_from(checkpoints, resume, engine)
    origin = found["start"] if found else weights_from(Path(config.start), task) if config.start else None
    interval = Interval()
    interval.load_state(state)
    task.load_state(state)
    start = found["step"] if found else 0
    writer = CheckpointWriter(checkpoints, rank, world, t.keep_last, t.keep_every, attempt)
    log = Log(run, start) if rank == 0 else None
    if rank == 0:
        where = f"from step {start} of {found['path']}" if found else "from scratch"
        where = f"with the weights of {origin['path']}" if origin and not found else where
        layout = f"{world} ranks, EP {engine.ep.size}, ZeRO {config.parallel.zero_stage}, {t.precision}"
        print(f"{task.name} {where}: {layout}, device {engine.device}", flush=True)
        print(f"kernels: {describe(engine.device)}; AdamW: {engine.optimizer_name}; norms: {engine.norm}", flush=True)
        if found and found["world_size"] != world:
            before = CheckpointReader(Path(found["path"])).state["config"]["training"]["batch_size"]
            changes = before * found["world_size"] != t.batch_size * world
            batch = ": the global batch changes with them" if changes else ""
            print(f"the checkpoint was made by {found['world_size']} ranks, now {world}{batch}", flush=True)

    def go_on() -> bool:
        watchdog.alive()
        stops = torch.tensor(float(bool(asked)), device=engine.device)
        dist.all_reduce(stops)
        return not stops

    steps, done, stopped = range(start, t.steps), start, False
    watchdog.alive()
    with guards:
        for step in progress(steps, task.name, len(steps)) if rank == 0 else steps:
            began = time.perf_counter()
            done, rate = step + 1, learning_rate(step, t)
            logs = done % t.log_every == 0 or done == t.steps
            task.begin(done, logs)
            batches = []
            for micro_batch in range(step * t.accumulation, done * t.accumulation):
                losses = task.losses(micro_batch)
                result = engine.step(losses["loss"], rate, bool(asked))
                batches.append({key: value.detach() for key, value in losses.items()})
            assert result is not None  # the last micro-batch of a step has one
            task.end(done, result.applied)
            if result.applied:
                for losses in batches:
                    interval.add(losses)
                interval.times.append(time.perf_counter() - began)
            else:
                interval.skipped += 1

            if logs and interval.times:
                seconds = statistics.median(interval.times)
                record: dict[str, Any] = {
                    "kind": "train",
                    "step": done,
                    **_mean_over_ranks(interval),
                    "learning_rate": rate,
                    "grad_norm": result.norm,
                    "grad_norm_shared": result.shared_norm,
                    "step_ms": seconds * 1e3,
                    "tokens_per_second": task.tokens * world * t.accumulation / seconds,
                    "peak_memory_bytes": peak_memory_bytes(),
                    "ep_size": engine.ep.size,
                    "skipped_steps": interval.skipped,
                    **task.record(done, result),
                }
                if log:
                    log.write(record)
                interval.clear()
            if done % t.validate_every == 0 or done == t.steps:
                errors = task.validate()
                if log:
                    log.write({"kind": "valid", "step": done, **errors})
            writer.check()
            watchdog.alive()
            stopped = result.stop and done < t.steps
            if done % t.checkpoint_every == 0 or done == t.steps or stopped:
                facts = {
                    "config": config.model_dump(),
                    "ep_size": engine.ep.size,
                    "zero_stage": config.parallel.zero_stage,
                    "updates": engine.updates,
                    "learning_rate": rate,
                    # The sampler is a function of these and the step.
                    "sampler": {"seed": config.seed, "batch_size": t.batch_size, "accumulation": t.accumulation},
                    "versions": versions(),
                    "start": origin,
                    **task.facts,
                }
                own = random_state() | interval.state() | task.state()
                writer.save(done, engine.fragments(), engine.shapes(), own, facts)
            if stopped:
                break
        writer.finish()
        stopped = stopped or not task.finish(go_on)
    if log:
        log.close()
    dist.barrier()
    dist.destroy_process_group()
    if lock:
        lock.close()
    if stopped:
        if rank == 0:
            print(f"stopped by a signal after step {done}: the same command goes on from there", flush=True)
        raise SystemExit(EXIT_REQUEUE)


def peak_memory_bytes() -> int:
    """Peak of this rank: device memory on a GPU, resident memory of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mean_over_ranks(interval: Interval) -> dict[str, float]:
    values = interval.means()
    dist.all_reduce(values)
    return dict(zip(interval.sums, (values / dist.get_world_size()).tolist(), strict=True))
