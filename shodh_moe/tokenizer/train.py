"""Training of the tokenizer on the snapshots of a dataset."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor

from shodh_moe.config import COMPRESSION, Config
from shodh_moe.data import FieldStats, list_trajectories
from shodh_moe.data.loader import WORKERS, Snapshots, read_batches
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.data.symmetry import Symmetry, apply_each
from shodh_moe.errors import UserError
from shodh_moe.files import sha256, whole_folder, write_text
from shodh_moe.progress import progress
from shodh_moe.tensors import save_tensors
from shodh_moe.tokenizer.autoencoder import space_to_depth
from shodh_moe.tokenizer.tokenizer import Tokenizer

# Which snapshots, and the symmetry that each is seen under.
Draw = tuple[list[int], list[Symmetry]]


def draw(train: Snapshots, sampler: DomainSampler | None, batch_size: int, seed: int, step: int) -> Draw:
    """The batch of a step: any snapshots or, given a sampler, those that it mixes; each under a random symmetry."""
    rng = np.random.default_rng([seed, step])  # by step, so that resuming continues the same order
    if sampler is None:
        picks = [int(i) for i in rng.choice(len(train), size=min(batch_size, len(train)), replace=False)]
    else:
        picks = train.indices(sampler.batch(step, rank=0))
    return picks, [Symmetry.draw_for(rng, train.record(pick)) for pick in picks]


def drawn_batches(snapshots: Snapshots, draws: Iterable[Draw], device: str) -> Iterator[Tensor]:
    """The snapshots of each draw under their symmetries, [B, 5, X, Y, Z] on ``device``; read ahead."""
    here, ahead = itertools.tee(draws)
    for (_, symmetries), fields in zip(here, on_device(snapshots, (picks for picks, _ in ahead), device), strict=True):
        yield apply_each(symmetries, fields)


def on_device(snapshots: Snapshots, batches: Iterable[Sequence[int]], device: str) -> Iterator[Tensor]:
    """Batches of snapshots as they are, [B, 5, X, Y, Z] on ``device``; read ahead."""
    gpu = torch.device(device).type == "cuda"
    for fields in read_batches(snapshots, batches, WORKERS, pin=gpu):
        yield fields.to(device, non_blocking=gpu)


def reconstruction_errors(tokenizer: Tokenizer, fields_B5XYZ: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors per sample of velocity [B] and pressure [B], on fields over their training rms."""
    normalised = tokenizer.normalise(fields_B5XYZ)
    flow = tokenizer.decode_normalised(tokenizer.encoder(normalised), fields_B5XYZ[:, 4:])
    velocity = (flow.velocity_B3XYZ - normalised[:, :3]).square().flatten(1).mean(1)
    pressure = (flow.pressure_B1XYZ - normalised[:, 3:4]).square().flatten(1).mean(1)
    return velocity, pressure


def train_tokenizer(config: Config, dataset: Path, folder: Path, device: str = "cpu") -> None:
    """Train and write ``tokenizer.safetensors``, ``tokenizer.json`` and ``metrics.jsonl`` into ``folder``.

    The loss is the mean squared error of velocity and pressure over their training rms, each field with the
    same weight per voxel (DESIGN 3.2). A killed training goes on from its last checkpoint.
    """
    c = config.tokenizer
    torch.manual_seed(config.seed)
    stats = FieldStats.load(dataset)
    data = config.data
    train, valid = (
        Snapshots(list_trajectories(dataset, split, data.grid, data.skip_bad)) for split in ("train", "valid")
    )
    weights = domain_weights(data.weights, train.domains)
    sampler = None if weights is None else DomainSampler(train.sizes, c.batch_size, config.seed, weights=weights)
    tokenizer = Tokenizer(c, config.data.grid)
    tokenizer.velocity_rms.fill_(stats.velocity_rms)
    tokenizer.pressure_rms.fill_(stats.pressure_rms)
    tokenizer.to(device)
    optimizer = torch.optim.AdamW(_learning_rate_groups(tokenizer, c.learning_rate), weight_decay=0.01)

    progress_folder = folder / "checkpoint"
    start, log, sums = _resume(progress_folder, tokenizer, optimizer)
    if not start:
        start_from_principal_components(tokenizer, train, config.seed)
    steps = range(start, c.steps)
    batches = drawn_batches(train, (draw(train, sampler, c.batch_size, config.seed, step) for step in steps), device)
    for step, fields in zip(progress(steps, "train tokenizer", len(steps)), batches, strict=True):
        velocity, pressure = (error.mean() for error in reconstruction_errors(tokenizer, fields))
        loss = (3 * velocity + pressure) / 4
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * _schedule(step, c.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()

        sums += torch.stack([velocity, pressure]).detach().double().cpu()
        done = step + 1
        if done % c.log_every == 0 or done == c.steps:
            v, p = (sums / ((done - 1) % c.log_every + 1)).tolist()
            if not math.isfinite(v + p):
                raise UserError(f"the tokenizer's loss is not finite at step {done}: lower tokenizer.learning_rate")
            log.append({"kind": "train", "step": done, "loss": (3 * v + p) / 4, "velocity_mse": v, "pressure_mse": p})
            sums.zero_()
        if done % c.checkpoint_every == 0 or done == c.steps:
            log.append({"kind": "valid", "step": done, **_validate(tokenizer, valid, c.batch_size, device)})
            _save_progress(progress_folder, tokenizer, optimizer, {"step": done, "log": log, "sums": sums.tolist()})

    _set_latent_statistics(tokenizer, train, c.batch_size, device)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in log))
    tokenizer.cpu().save(folder)  # last: its tokenizer.json tells that training is complete


@torch.no_grad()
def start_from_principal_components(tokenizer: Tokenizer, train: Snapshots, seed: int, samples: int = 512) -> None:
    """Set the linear parts of encoder and decoder, and the geometry latent's basis, from training patches.

    Principal components without centring, so that a field at rest has the latent zero; at most ``samples``
    randomly shifted snapshots are looked at.
    """
    rng = np.random.default_rng([seed, 0x7C4])
    channels, patch = tokenizer.config.latent_channels, COMPRESSION**3
    flow, solid = (torch.zeros(size, size, dtype=torch.float64) for size in (4 * patch, patch))
    mean, count = torch.zeros(patch, dtype=torch.float64), 0
    device = tokenizer.velocity_rms.device
    picks = [int(i) for i in rng.permutation(len(train))[:samples]]
    draws = (([pick], [Symmetry.draw_for(rng, train.record(pick))]) for pick in picks)
    for fields in drawn_batches(train, draws, str(device)):
        x = space_to_depth(tokenizer.normalise(fields), COMPRESSION)[0].flatten(1).T.cpu()
        flow += (x[:, : 4 * patch].T @ x[:, : 4 * patch]).double()
        solid += (x[:, 4 * patch :].T @ x[:, 4 * patch :]).double()
        mean += x[:, 4 * patch :].double().sum(0)
        count += len(x)
    basis = _leading(flow / count, channels)[0].float().to(device)
    tokenizer.encoder.project.weight.copy_(basis.view(-1, 4, *[COMPRESSION] * 3))
    tokenizer.decoder.patches.weight.copy_(basis.view(-1, 4, *[COMPRESSION] * 3))
    mean /= count
    vectors, values = _leading(solid / count - torch.outer(mean, mean), channels)
    present = values > 1e-6 * values[0].clamp(min=1.0)  # rounding is no component: the mask is 0 or 1
    scaled = torch.where(present[:, None], vectors / values.clamp(min=1e-12).sqrt()[:, None], 0.0)
    tokenizer.geometry_mean_P.copy_(mean)
    tokenizer.geometry_basis_CP[: len(scaled)].copy_(scaled)


def _leading(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` leading eigenvectors as rows, signs fixed by their largest entry, and their eigenvalues."""
    size = len(covariance)
    # Only the leading ones: several times faster than torch.linalg.eigh, which computes all.
    values, vectors = scipy.linalg.eigh(covariance.numpy(), subset_by_index=[max(size - count, 0), size - 1])
    rows = torch.from_numpy(vectors.T[::-1].copy())
    sign = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    return rows * sign, torch.from_numpy(values[::-1].copy()).clamp(min=0)


def _learning_rate_groups(tokenizer: Tokenizer, learning_rate: float) -> list[dict[str, Any]]:
    """Each weight at ``learning_rate * 16 / sqrt(fan-in)``: Adam moves every entry alike, and the more inputs
    a layer sums, the further the same step moves its output."""
    return [
        {"params": [p], "base": learning_rate * (16 / p[0].numel() ** 0.5 if p.dim() > 1 else 1.0)}
        for p in tokenizer.parameters()
    ]


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: 5 % linear warm-up, then a cosine to 2 %."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def _validate(tokenizer: Tokenizer, valid: Snapshots, batch: int, device: str) -> dict[str, dict[str, float]]:
    """Reconstruction errors by domain over at most 64 evenly spread snapshots a domain."""
    result: dict[str, dict[str, float]] = {"velocity_mse": {}, "pressure_mse": {}}
    for number, domain in enumerate(valid.domains):
        picks = valid.of_domain(number)
        picks = picks[:: max(len(picks) // 64, 1)]
        batches = on_device(valid, [picks[k : k + batch] for k in range(0, len(picks), batch)], device)
        errors = [torch.stack(reconstruction_errors(tokenizer, fields)) for fields in batches]
        velocity, pressure = torch.cat(errors, dim=1).mean(dim=1).tolist()
        result["velocity_mse"][domain], result["pressure_mse"][domain] = velocity, pressure
    return result


@torch.no_grad()
def _set_latent_statistics(tokenizer: Tokenizer, train: Snapshots, batch: int, device: str) -> None:
    """Per-channel mean and standard deviation of raw latents over the training split, float64 sums."""
    total = square = torch.zeros(tokenizer.config.latent_channels, dtype=torch.float64, device=device)
    count = 0
    parts = [range(first, min(first + batch, len(train))) for first in range(0, len(train), batch)]
    for fields in on_device(train, parts, device):
        z = tokenizer.encoder(tokenizer.normalise(fields)).double().transpose(0, 1).flatten(1)
        total, square, count = total + z.sum(1), square + z.square().sum(1), count + z.shape[1]
    mean = total / count
    tokenizer.latent_mean_C.copy_(mean)
    tokenizer.latent_std_C.copy_((square / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6))


def _save_progress(folder: Path, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace the training checkpoint as a whole; ``state`` is what `_resume` returns."""
    names = [name for name, _ in tokenizer.named_parameters()]
    moments = {
        f"{name}/{key}": value
        for name, of_one in zip(names, optimizer.state_dict()["state"].values(), strict=True)
        for key, value in of_one.items()
    }
    with whole_folder(folder) as temporary:
        save_tensors(tokenizer.state_dict(), temporary / "model.safetensors")
        save_tensors(moments, temporary / "optimizer.safetensors")
        hashes = {path.name: sha256(path) for path in temporary.iterdir()}
        (temporary / "state.json").write_text(json.dumps({**state, "sha256": hashes}))


def _resume(
    folder: Path, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]], Tensor]:
    """Step, log and sums since its last line of the training checkpoint, which is loaded into model and optimizer.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not folder.exists():
        return 0, [], torch.zeros(2, dtype=torch.float64)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        step, log, sums = int(state["step"]), state["log"], torch.tensor(state["sums"], dtype=torch.float64)
        damaged = [name for name, expected in state["sha256"].items() if sha256(folder / name) != expected]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = ["state.json"]
    if damaged:
        raise UserError(f"tokenizer checkpoint {folder / damaged[0]} is damaged: delete {folder} to start again")
    tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
    stored = load_file(folder / "optimizer.safetensors")
    names = [name for name, _ in tokenizer.named_parameters()]
    moments: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(names))}
    for key, value in stored.items():
        name, _, moment = key.rpartition("/")
        moments[names.index(name)][moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return step, log, sums
