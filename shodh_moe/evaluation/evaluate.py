"""Evaluate a pretrained model on the held-out test trajectories: write metrics.json and the report's arrays.

Runs in one process and reads checkpoints of any expert-parallel layout. Predictions drop no tokens. Only the routing
section uses mixed batches with the capacity of training, so that ``dropped_fraction`` is what training would drop on
held-out data.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh_moe.base.files import write_text
from shodh_moe.base.progress import progress
from shodh_moe.base.records import read_run
from shodh_moe.base.threads import map_in_threads
from shodh_moe.config import Config
from shodh_moe.config.paths import Paths
from shodh_moe.data import Trajectory, list_trajectories, read_snapshots, read_trajectory, trajectories_by_source
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.evaluation.divergence import divergence_table
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.one_step import predict_trajectory
from shodh_moe.inference.rollout import decode, decode_both, rollout
from shodh_moe.metrics.fields import band_errors, energy_spectrum, nrmse, vrmse
from shodh_moe.metrics.routing import joint_counts, mutual_information, solid_fraction_category, summarise_routing
from shodh_moe.tokenizer.encoding import trajectory_fields
from shodh_moe.tokenizer.latents import (
    LatentSamples,
    LatentTrajectory,
    load_latents,
    require_boundaries,
    samples_of,
)
from shodh_moe.training.telemetry import RoutingCounts

# Memory to measure one trajectory, in units of its velocity: eight fields like it, in float64.
WORKSPACE = 20
SOLID_CATEGORIES = 4  # all fluid, less than half solid, more, all solid


def evaluate(config: Config, paths: Paths) -> dict[str, Any]:
    """Measure the newest checkpoint of a run; write ``metrics.json`` and ``evaluation.npz`` to its folder.

    Raises:
        UserError: there is no checkpoint, or data and tokenizer do not fit together.
    """
    model = load_source(find_source(paths.run, paths.tokenizer), config.model)
    return measure(config, model, paths, paths.run, read_run(paths.run, "train"))


@torch.no_grad()
def measure(config: Config, model: Model, paths: Paths, folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure ``model`` on the test split; write ``metrics.json`` and ``evaluation.npz`` to ``folder``.

    Args:
        history: the training records, for throughput and memory; with [] those are null.

    Returns:
        the content of ``metrics.json``.
    """
    train, test = (
        samples_of(config, load_latents(paths.latents, split, paths.tokenizer), split) for split in ("train", "test")
    )
    require_boundaries(test, config.model)
    domains = test.domains
    listing = config.data.grid, config.data.skip_bad
    records = trajectories_by_source(paths.dataset, "test", *listing)

    results: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Any] = {"domains": np.array(domains)}
    conserved: dict[torch.dtype, list[Tensor]] = {torch.float64: [], torch.float32: []}
    simulated = {}
    for domain in domains:
        pairs = [(z, read_trajectory(records[z.source, z.sample])) for z in test.trajectories if z.domain == domain]
        mean_fields = _mean_fields(paths.dataset, domain, *listing)
        mean_latent = _mean_latent([z for z in train.trajectories if z.domain == domain])
        need = WORKSPACE * max(truth.velocity_T3XYZ.nbytes for _, truth in pairs)
        measure_one = partial(_measure_one, model, config, test, mean_latent, mean_fields)
        measured = map_in_threads(measure_one, [(pair, pair is pairs[0]) for pair in pairs], need)
        errors = []
        for found, one_step in progress(measured, f"evaluate {domain}", len(pairs)):
            errors.append(found)
            if one_step:
                arrays.update({f"{domain}/{key}": value for key, value in one_step.pictures().items()})
                simulated[domain] = one_step.true[:, :3]
                conserved[torch.float64].append(one_step.conserved)
                conserved[torch.float32].append(one_step.conserved_in_float32())
        results[domain] = {key: float(np.mean([e[key] for e in errors])) for key in errors[0] if key != "band_errors"}
        results[domain]["band_errors"] = {"velocity": np.mean([e["band_errors"] for e in errors], axis=0).tolist()}
        results[domain]["n_tokens"] = sum(_tokens(z, config) for z, _ in pairs)
        free_running = _rollouts(model, config, test, pairs)
        results[domain]["rollout_nrmse"] = free_running["rollout_error"].tolist()
        results[domain]["rollout_nrmse_persistence"] = free_running["rollout_error_persistence"].tolist()
        arrays.update({f"{domain}/{key}": value for key, value in free_running.items()})

    velocities = {dtype: torch.cat(parts) for dtype, parts in conserved.items()}
    table = divergence_table(velocities, simulated, model.tokenizer.config.operator)
    exact = table[0]
    metrics = {
        "run": config.name,
        "step": model.step,
        "world_size": model.world_size,
        "ep_size": model.ep_size,
        "weights_sha256": model.weights_sha256,
        "seed": config.seed,
        "domains": results,
        "routing": routing_on_heldout(model, config, test),
        "divergence": {
            key: exact[key] for key in ("operator", "dtype", "rms_relative", "rms", "max", "spacing", "norm")
        },
        "divergence_table": table,
        "throughput": {
            "tokens_per_second": _median(history, "tokens_per_second"),
            "step_ms_median": _median(history, "step_ms"),
        },
        "peak_memory_bytes": max((record["peak_memory_bytes"] for record in history), default=None),
    }
    np.savez_compressed(folder / "evaluation.npz", **arrays)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _measure_one(
    model: Model,
    config: Config,
    samples: LatentSamples,
    mean_latent: Tensor,
    mean_fields: Tensor,
    job: tuple[tuple[LatentTrajectory, Trajectory], bool],
) -> tuple[dict[str, Any], _OneStep | None]:
    """Return the errors of one trajectory's one-step predictions, and if the job says so, the predictions."""
    (latent, truth), keep = job
    one_step = _OneStep(model, config, samples, latent, truth)
    return one_step.errors(mean_latent, mean_fields), one_step if keep else None


class _OneStep:
    """One-step predictions of every snapshot of a test trajectory from the true snapshots before it.

    Shapes: T predicted snapshots; fields are [T, 4, X, Y, Z] (velocity, pressure) in the data's units, the
    velocity decoded in float64. ``conserved`` [T, 3, X, Y, Z] is the velocity whose divergence vanishes.
    """

    def __init__(
        self, model: Model, config: Config, samples: LatentSamples, latent: LatentTrajectory, truth: Trajectory
    ):
        h, s = config.model.history, config.measured_stride
        self.config, self.tokenizer, self.latent = config, model.tokenizer, latent
        self.solid = torch.from_numpy(truth.solid_1XYZ)
        fields = trajectory_fields(truth)[:, :4].double()
        self.true, self.before = fields[h * s :], fields[(h - 1) * s : -s]
        z_TCxyz = latent.read()
        self.z_true, self.z_before = z_TCxyz[h * s :], z_TCxyz[(h - 1) * s : -s]
        size = config.evaluation.batch_size
        self.z, self.experts = predict_trajectory(model.transformer, samples, latent, size)
        decoded = [decode_both(model.tokenizer, part, self.solid) for part in self.z.split(size)]
        self.predicted, self.conserved = (torch.cat(parts) for parts in zip(*decoded, strict=True))

    def conserved_in_float32(self) -> Tensor:
        """``conserved`` as training computes it."""
        parts = self.z.split(self.config.evaluation.batch_size)
        return torch.cat([decode_both(self.tokenizer, part, self.solid, torch.float32)[1] for part in parts])

    def errors(self, mean_latent: Tensor, mean_fields: Tensor) -> dict[str, Any]:
        """Return mean errors over this trajectory's predictions (DESIGN 3.6)."""
        rms = torch.stack([self.tokenizer.velocity_rms] * 3 + [self.tokenizer.pressure_rms]).double()[
            :, None, None, None
        ]
        reconstruction = torch.cat(
            [decode(self.tokenizer, part, self.solid) for part in self.z_true.split(self.config.evaluation.batch_size)]
        )

        def physical(fields: Tensor) -> float:
            return float(((fields - self.true) / rms).square().mean())

        velocity, true_velocity = self.predicted[:, :3], self.true[:, :3]
        return {
            "latent_mse": float((self.z - self.z_true).square().mean()),
            "latent_mse_persistence": float((self.z_before - self.z_true).square().mean()),
            "latent_mse_mean": float((mean_latent - self.z_true).square().mean()),
            "physical_mse": physical(self.predicted),
            "physical_mse_persistence": physical(self.before),
            "physical_mse_mean": physical(mean_fields),
            "physical_mse_reconstruction": physical(reconstruction),
            "velocity_vrmse": float(vrmse(velocity, true_velocity).mean()),
            "velocity_vrmse_persistence": float(vrmse(self.before[:, :3], true_velocity).mean()),
            "pressure_vrmse": float(vrmse(self.predicted[:, 3:], self.true[:, 3:]).mean()),
            "pressure_vrmse_persistence": float(vrmse(self.before[:, 3:], self.true[:, 3:]).mean()),
            "velocity_nrmse": float(nrmse(velocity, true_velocity).mean()),
            "band_errors": band_errors(velocity, true_velocity).mean(0).tolist(),
        }

    def pictures(self) -> dict[str, np.ndarray]:
        """Return the arrays of the middle prediction that the report draws."""
        middle = len(self.true) // 2
        reconstruction = decode(self.tokenizer, self.z_true[middle : middle + 1], self.solid)[0]
        k, spectrum = energy_spectrum(self.true[middle, :3])
        grid = [size // self.config.model.patch for size in self.z.shape[2:]]
        arrays = {
            "true": self.true[middle],
            "pred": self.predicted[middle],
            "solid": self.solid[0],
            "spectrum_k": k,
            "spectrum_true": spectrum,
            "spectrum_pred": energy_spectrum(self.predicted[middle, :3])[1],
            "spectrum_reconstruction": energy_spectrum(reconstruction[:3])[1],
            "solid_fraction": self.latent.solid_fraction_by_token(self.config.model.patch),
        }
        if self.experts:
            arrays["expert_map"] = torch.stack([layer[middle].view(grid) for layer in self.experts])
        return {
            key: value.numpy().astype(np.int32 if key == "expert_map" else np.float32) for key, value in arrays.items()
        }


def _rollouts(
    model: Model, config: Config, samples: LatentSamples, pairs: list[tuple[LatentTrajectory, Trajectory]]
) -> dict[str, np.ndarray]:
    """Return the velocity nRMSE of free-running predictions from the start of each trajectory, and of persistence."""
    h, s = config.model.history, config.measured_stride
    steps = min(config.evaluation.rollout_steps, (min(z.snapshots for z, _ in pairs) - 1) // s - h + 1)

    def roll(pair: tuple[LatentTrajectory, Trajectory]) -> Tensor:
        """Errors [2, steps] of the prediction and of persistence."""
        latent, truth = pair
        given, context = latent.read(0, h * s, s)[None], samples.context(latent)
        predicted = rollout(model.transformer, given, latent.geometry_Cxyz[None], context)
        velocity, solid = torch.from_numpy(truth.velocity_T3XYZ), torch.from_numpy(truth.solid_1XYZ)
        errors = torch.zeros(2, steps)
        for step, z in zip(range(steps), predicted, strict=False):
            target = velocity[(h + step) * s]
            errors[0, step] = nrmse(decode(model.tokenizer, z, solid)[0, :3], target.double())
            errors[1, step] = nrmse(velocity[(h - 1) * s], target)
        return errors

    snapshot_bytes = max(truth.velocity_T3XYZ[0].nbytes for _, truth in pairs)
    errors, still = torch.stack(list(map_in_threads(roll, pairs, WORKSPACE * snapshot_bytes)), dim=1)
    return {
        "rollout_time": np.arange(1, steps + 1, dtype=np.float32),
        "rollout_error": errors.mean(0).numpy(),
        "rollout_error_low": errors.amin(0).numpy(),
        "rollout_error_high": errors.amax(0).numpy(),
        "rollout_error_persistence": still.mean(0).numpy(),
    }


def routing_on_heldout(model: Model, config: Config, samples: LatentSamples) -> dict[str, Any]:
    """Return load, purity, entropy, dropped share and mutual information by layer, in batches mixed as in training.

    A dense model has no layers in the result.
    """
    experts, layers = config.model.moe.num_experts, model.transformer.moe_layers
    if not layers:
        return summarise_routing([])
    sampler = DomainSampler(samples.sizes, config.training.batch_size, config.seed, weights=samples.weights)
    counts = RoutingCounts(len(layers), samples.domains, experts)
    domains = len(samples.domains)
    by_domain, by_solid = (
        [torch.zeros(categories, experts, dtype=torch.float64) for _ in layers]
        for categories in (domains, SOLID_CATEGORIES)
    )
    for step in range(max(-(-size // share) for size, share in zip(samples.sizes, sampler.shares, strict=True))):
        picks = sampler.batch(step, 0)
        batch = samples.batch(picks)
        history, geometry, context = batch.inputs
        routing = model.transformer(history, geometry, replace(context, drop=True)).routing
        counts.add(routing, batch.domain_B)
        picked = [samples.trajectories[samples.index[domain][index][0]] for domain, index in picks]
        solid = torch.stack([trajectory.solid_fraction_by_token(config.model.patch) for trajectory in picked])
        category = solid_fraction_category(solid.flatten(), SOLID_CATEGORIES)
        domain_N = batch.domain_B.repeat_interleave(len(category) // len(picks))
        for layer, decision in enumerate(routing):
            by_domain[layer] += joint_counts(domain_N, decision.expert_N, domains, experts)
            by_solid[layer] += joint_counts(category, decision.expert_N, SOLID_CATEGORIES, experts)
    summary = counts.summary()
    result = summarise_routing(
        [dict(zip(samples.domains, table, strict=True)) for table in by_domain],
        dropped_fraction=[record["dropped_fraction"] for record in summary],
        entropy=[record["entropy"] for record in summary],
    )
    for record, table in zip(result["layers"], by_solid, strict=True):
        record["mutual_information"]["solid_fraction"] = mutual_information(table)
    return result


def _mean_latent(train: list[LatentTrajectory]) -> Tensor:
    """Return the mean over a domain's training latents, cell by cell: [C, x, y, z]."""
    return torch.stack([trajectory.read().mean(0) for trajectory in train]).mean(0)


def _mean_fields(dataset: Path, domain: str, grid: list[int], skip_bad: bool) -> Tensor:
    """Return the domain's mean over all training snapshots, voxel by voxel: float64 [4, X, Y, Z]."""
    total, count = torch.zeros(4, *grid, dtype=torch.float64), 0
    for record in list_trajectories(dataset, "train", grid, skip_bad):
        if record.domain == domain:
            fields, _ = read_snapshots(record)
            total += torch.from_numpy(fields.sum(axis=0, dtype=np.float64))
            count += len(fields)
    return total / max(count, 1)


def _tokens(latent: LatentTrajectory, config: Config) -> int:
    _, _, *grid = latent.z.shape
    windows = latent.snapshots - config.model.history * config.measured_stride
    return windows * int(np.prod(grid)) // config.model.patch**3


def _median(history: list[dict[str, Any]], key: str) -> float | None:
    return statistics.median(record[key] for record in history) if history else None
