"""Pretraining of the latent mixture-of-experts transformer: the script every rank runs, top to bottom.

Started by ``launch/pretrain.py`` under the DeepSpeed launcher, or by any launcher that sets RANK,
LOCAL_RANK and WORLD_SIZE; with none it is one process.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.checkpoint import CheckpointWriter
from shodh_moe.config import Config, TrainingConfig
from shodh_moe.config_io import flatten
from shodh_moe.errors import EXIT_REQUEUE
from shodh_moe.kernels import expert_capacity
from shodh_moe.kernels.backend import describe
from shodh_moe.model import Prediction
from shodh_moe.parallel import Exchange
from shodh_moe.parallel.rendezvous import versions
from shodh_moe.progress import progress
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.engine import Engine, init_distributed
from shodh_moe.training.interval import Interval
from shodh_moe.training.lock import lock_run
from shodh_moe.training.log import Log
from shodh_moe.training.nonfinite import MicroBatch, NonFinite
from shodh_moe.training.resume import on_rank_0, random_state, start_from
from shodh_moe.training.sampler import DomainSampler
from shodh_moe.training.stopping import stop_request
from shodh_moe.training.telemetry import RoutingCounts, Warnings, layer_records
from shodh_moe.training.watchdog import watched


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to ``min_learning_rate`` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def total_loss(prediction: Prediction, target_BCxyz: Tensor, config: Config) -> tuple[dict[str, Tensor], Tensor]:
    """Latent MSE plus the weighted balance and z losses, means over layers; and the MSE of each sample.

    Returns the three parts and their sum, ``loss``, by name; and float [B].
    """
    layers, router = prediction.routing, config.model.moe.router
    error_B = (prediction.latent_BCxyz - target_BCxyz).square().flatten(1).mean(1)
    prediction_loss = error_B.mean()
    balance = torch.stack([r.balance_loss for r in layers]).mean()
    z = torch.stack([r.z_loss for r in layers]).mean()
    loss = prediction_loss + router.balance_weight * balance + router.z_weight * z
    return {"loss": loss, "prediction_loss": prediction_loss, "balance_loss": balance, "z_loss": z}, error_B.detach()


def pretrain(
    config: Config,
    run: Path,
    latents: Path,
    resume: str = "auto",
    tokenizer_sha256: str | None = None,
    stop_file: Path | None = None,
) -> None:
    """Train to ``training.steps``.

    Args:
        resume: ``auto`` goes on from the newest intact checkpoint of the run folder, if there is one; a checkpoint
            folder goes on from that one.
        tokenizer_sha256: hash of the tokenizer that made the latents; checkpoints keep it.
        stop_file: by which the launching process asks for an end (`sentinel`).

    Raises:
        UserError: ranks disagree, nothing fits to resume from, a step was not finite under the policy ``halt``, or
            another process trains in the run folder.
        SystemExit: with `EXIT_REQUEUE`, after SIGTERM or SIGUSR1 and a checkpoint.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    t = config.training
    train = LatentSamples(load_latents(latents, "train"), config.model.history)
    valid = LatentSamples(load_latents(latents, "valid"), config.model.history)
    _, channels, *grid = train.trajectories[0].z.shape
    init_distributed(_facts(config, train, valid))
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = Engine(config, channels, list(grid))
    sampler = DomainSampler(train.sizes, t.batch_size, config.seed, world)

    lock = on_rank_0(lambda: lock_run(run), tell=False)
    attempt = on_rank_0(lambda: uuid.uuid4().hex)  # tells this start of the run from all others
    guards = ExitStack()
    asked = guards.enter_context(stop_request())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    watchdog = guards.enter_context(watched(run, rank, local_rank, attempt, t.stall_seconds, stop_file))
    layers = engine.model.moe_layers
    interval = Interval(RoutingCounts(len(layers), train.domains, config.model.moe.num_experts, engine.device))
    checkpoints = run / "checkpoints"
    found = start_from(checkpoints, resume, engine, interval)
    start = found["step"] if found else 0
    writer = CheckpointWriter(checkpoints, rank, world, t.keep_last, t.keep_every, attempt)
    log = Log(run, start) if rank == 0 else None
    if rank == 0:
        where = f"from step {start} of {found['path']}" if found else "from scratch"
        layout = f"{world} ranks, EP {engine.ep.size}, ZeRO {config.parallel.zero_stage}, {t.precision}"
        print(f"pretrain {where}: {layout}, device {engine.device}", flush=True)
        print(f"kernels: {describe(engine.device)}; AdamW: {engine.optimizer_name}; norms: {engine.norm}", flush=True)
        if found and found["world_size"] != world:
            was = found["world_size"]
            print(
                f"the checkpoint was made by {was} ranks, now {world}: the global batch changes with them", flush=True
            )

    warnings = Warnings(config.telemetry)
    nonfinite = NonFinite(t.on_nonfinite, run, train)
    steps, stopped = range(start, t.steps), False
    watchdog.alive()
    with guards:
        for step in progress(steps, "pretrain", len(steps)) if rank == 0 else steps:
            began = time.perf_counter()
            done, rate, batches = step + 1, learning_rate(step, t), []
            logs = done % t.log_every == 0 or done == t.steps
            tells = logs and (done - interval.told >= config.telemetry.every or done == t.steps)
            exchanges: list[Exchange] = []
            engine.ep.exchanges = exchanges if tells else None
            for micro in range(step * t.accumulation, done * t.accumulation):
                picks = sampler.batch(micro, rank)
                history, geometry, target, domain_B = _to(engine, *train.batch(picks))
                prediction = engine(history, geometry)
                losses, error_B = total_loss(prediction, target, config)
                result = engine.step(losses["loss"], rate, bool(asked))
                losses = {key: value.detach() for key, value in losses.items()}
                batches.append(MicroBatch(picks, domain_B, error_B, losses, prediction.routing))
            engine.ep.exchanges = None
            assert result is not None  # the last micro-batch of a step has one
            if result.applied:
                nonfinite.all_well()
                for batch in batches:
                    interval.counts.add(batch.routing, batch.domain_B)
                    interval.add(batch.losses)
                interval.times.append(time.perf_counter() - began)
            else:
                nonfinite.handle(done, batches)
                interval.skipped += 1

            if logs and interval.times:
                record: dict[str, Any] = {
                    "kind": "train",
                    "step": done,
                    **_mean_over_ranks(interval),
                }
                seconds = statistics.median(interval.times)
                tokens = len(prediction.routing[0].expert_N) * world * t.accumulation
                record |= {
                    "learning_rate": rate,
                    "grad_norm": result.norm,
                    "grad_norm_shared": result.shared_norm,
                    "step_ms": seconds * 1e3,
                    "tokens_per_second": tokens / seconds,
                    "peak_memory_bytes": peak_memory_bytes(),
                    "ep_size": engine.ep.size,
                    "skipped_steps": interval.skipped,
                }
                if tells:
                    record["routing"] = layer_records(interval.counts, layers, exchanges, result.expert_norms_LE)
                    interval.told = done
                    interval.counts.clear()
                if log:
                    log.write(record)
                    for line in warnings.check(done, record["routing"]) if tells else []:
                        print(line, flush=True)
                interval.clear()
            if done % t.validate_every == 0 or done == t.steps:
                errors = validate(engine, valid, config)
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
                    "tokenizer_sha256": tokenizer_sha256,
                }
                own = random_state() | interval.state()
                writer.save(done, engine.fragments(), engine.shapes(), own, facts)
            if stopped:
                break
        writer.finish()
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


def _facts(config: Config, train: LatentSamples, valid: LatentSamples) -> dict[str, Any]:
    """What all ranks must start with alike, or the exchanges between them would hang or mix up tokens."""
    shape = list(train.trajectories[0].z.shape[1:])
    tokens = config.training.batch_size * math.prod(shape[1:]) // config.model.patch**3
    moe = config.model.moe
    capacity = expert_capacity(tokens, moe.num_experts, moe.capacity_factor, moe.min_capacity)
    return {
        **flatten(config.model_dump()),
        "tokens of a micro-batch": tokens,
        "capacity of an expert": None if moe.dropless else capacity,
        "shape of the latents": shape,
        "samples of the training latents by domain": dict(zip(train.domains, train.sizes, strict=True)),
        "samples of the validation latents by domain": dict(zip(valid.domains, valid.sizes, strict=True)),
    }


@torch.no_grad()
def validate(engine: Engine, valid: LatentSamples, config: Config) -> dict[str, dict[str, float]]:
    """Latent MSE and persistence's by domain over the whole validation split, shared out over the ranks."""
    rank, world, size = dist.get_rank(), dist.get_world_size(), config.evaluation.batch_size
    engine.model.eval()
    totals = torch.zeros(len(valid.domains), 3, dtype=torch.float64, device=engine.device)
    everything = [(domain, i) for domain, count in enumerate(valid.sizes) for i in range(count)]
    # Every rank makes the same number of calls: the all-to-all inside waits for all of them.
    for first in range(0, len(everything), size * world):
        mine = everything[first + rank * size : first + (rank + 1) * size]
        history, geometry, target, domain_B = _to(engine, *valid.batch(mine or everything[:1]))
        with engine.autocast():
            predicted = engine.model(history, geometry).latent_BCxyz
        error = (predicted - target).square().flatten(1).mean(1)
        change = (history[:, -1] - target).square().flatten(1).mean(1)
        if mine:
            rows = torch.stack([error, change, torch.ones_like(error)], dim=1).double()
            totals.index_add_(0, domain_B, rows)
    dist.all_reduce(totals)
    engine.model.train()
    means = (totals[:, :2] / totals[:, 2:]).tolist()
    return {
        "latent_mse": {domain: row[0] for domain, row in zip(valid.domains, means, strict=True)},
        "latent_mse_persistence": {domain: row[1] for domain, row in zip(valid.domains, means, strict=True)},
    }


def peak_memory_bytes() -> int:
    """Peak of this rank: device memory on a GPU, resident memory of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mean_over_ranks(interval: Interval) -> dict[str, float]:
    values = interval.means()
    dist.all_reduce(values)
    return dict(zip(interval.sums, (values / dist.get_world_size()).tolist(), strict=True))


def _to(engine: Engine, *tensors: Tensor) -> list[Tensor]:
    """On the engine's device, floating-point ones in its dtype."""
    return [
        tensor.to(engine.device, engine.dtype if tensor.is_floating_point() else None, non_blocking=True)
        for tensor in tensors
    ]
