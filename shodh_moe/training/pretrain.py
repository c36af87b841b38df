"""Pretraining of the latent mixture-of-experts transformer: the script every rank runs, top to bottom.

Started by ``launch/pretrain.py`` under the DeepSpeed launcher, or by any launcher that sets RANK,
LOCAL_RANK and WORLD_SIZE; with none it is one process.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.config import Config, TrainingConfig
from shodh_moe.errors import UserError
from shodh_moe.kernels.backend import describe
from shodh_moe.model import Prediction
from shodh_moe.progress import progress
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from shodh_moe.training.engine import Engine, init_distributed
from shodh_moe.training.sampler import DomainSampler
from shodh_moe.training.telemetry import Log, RoutingCounts


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to ``min_learning_rate`` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def total_loss(prediction: Prediction, target: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Latent MSE plus the weighted balance and z losses, means over layers; and the three parts."""
    layers = prediction.routing
    parts = {
        "prediction_loss": (prediction.latent_BCxyz - target).square().mean(),
        "balance_loss": torch.stack([r.balance_loss for r in layers]).mean(),
        "z_loss": torch.stack([r.z_loss for r in layers]).mean(),
    }
    router = config.model.moe.router
    loss = parts["prediction_loss"] + router.balance_weight * parts["balance_loss"] + router.z_weight * parts["z_loss"]
    return loss, {"loss": loss, **parts}


def pretrain(config: Config, run: Path, latents: Path) -> None:
    """Train to ``training.steps``, from the newest intact checkpoint of the run folder if there is one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    init_distributed()
    rank, world, t = dist.get_rank(), dist.get_world_size(), config.training
    train = LatentSamples(load_latents(latents, "train"), config.model.history)
    valid = LatentSamples(load_latents(latents, "valid"), config.model.history)
    _, channels, *grid = train.trajectories[0].z.shape
    engine = Engine(config, channels, list(grid))
    sampler = DomainSampler(train.sizes, t.batch_size, config.seed, world)

    checkpoints, start = run / "checkpoints", 0
    if found := find_checkpoint(checkpoints):
        load_checkpoint(found[0], engine.model, engine.optimizer, engine.ep)
        start = found[1]["step"]
        if rank == 0 and found[1]["world_size"] != world:
            was = found[1]["world_size"]
            print(
                f"the checkpoint was made by {was} ranks, now {world}: the global batch changes with them", flush=True
            )
    log = Log(run, start) if rank == 0 else None
    if rank == 0:
        where = f"from step {start}" if start else "from scratch"
        print(f"pretrain {where}: {world} ranks, EP {engine.ep.size}, device {engine.device}", flush=True)
        print(f"kernels: {describe(engine.device)}", flush=True)

    counts = RoutingCounts(config.model.depth, train.domains, config.model.moe.num_experts)
    sums: dict[str, Tensor] = {}
    times: list[float] = []
    steps = range(start, t.steps)
    for step in progress(steps, "pretrain", len(steps)) if rank == 0 else steps:
        began = time.perf_counter()
        rate = learning_rate(step, t)
        for micro in range(step * t.accumulation, (step + 1) * t.accumulation):
            history, geometry, target, domain_B = _to(engine.device, *train.batch(sampler.batch(micro, rank)))
            prediction = engine(history, geometry)
            loss, parts = total_loss(prediction, target, config)
            norm = engine.step(loss, rate)
            counts.add(prediction.routing, domain_B)
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + value.detach()
        times.append(time.perf_counter() - began)

        done = step + 1
        if done % t.log_every == 0 or done == t.steps:
            means = _mean_over_ranks(sums, len(times) * t.accumulation)
            if not math.isfinite(means["loss"]):
                raise UserError(f"the loss is {means['loss']} at step {done}: lower training.learning_rate")
            routing = counts.summary()
            seconds = statistics.median(times)
            tokens = len(prediction.routing[0].expert_N) * world * t.accumulation
            record = {
                "kind": "train",
                "step": done,
                **means,
                "learning_rate": rate,
                "grad_norm": norm,
                "step_ms": seconds * 1e3,
                "tokens_per_second": tokens / seconds,
                "peak_memory_bytes": peak_memory_bytes(),
                "ep_size": engine.ep.size,
                "routing": routing,
            }
            if log:
                log.write(record)
            counts.clear()
            sums, times = {}, []
        if done % t.validate_every == 0 or done == t.steps:
            errors = validate(engine, valid, config)
            if log:
                log.write({"kind": "valid", "step": done, **errors})
        if done % t.checkpoint_every == 0 or done == t.steps:
            save_checkpoint(
                checkpoints, done, engine.model, engine.optimizer, engine.ep, config.model_dump(), t.keep_last
            )
    if log:
        log.close()
    dist.barrier()
    dist.destroy_process_group()


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
        history, geometry, target, domain_B = _to(engine.device, *valid.batch(mine or everything[:1]))
        error = (engine.model(history, geometry).latent_BCxyz - target).square().flatten(1).mean(1)
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


def _mean_over_ranks(sums: dict[str, Tensor], count: int) -> dict[str, float]:
    values = torch.stack([value.double() for value in sums.values()]) / count
    dist.all_reduce(values)
    return dict(zip(sums, (values / dist.get_world_size()).tolist(), strict=True))


def _to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in tensors]
