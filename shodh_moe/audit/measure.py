"""Measure one trained run and write the result as JSON. Nothing is selected by these measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shodh_moe.audit.arms import SINGLE, Run, unseen_config
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.gradients import gradients_over_training
from shodh_moe.audit.kinship import growth_on_experts
from shodh_moe.audit.outcome import diverged, last_checkpoint, run_folder
from shodh_moe.audit.place import place_information
from shodh_moe.audit.plasticity import plasticity
from shodh_moe.audit.routing import bifurcation, heldout_routing, local_speeds, unseen
from shodh_moe.audit.swap import swap_growth
from shodh_moe.base.records import read_run
from shodh_moe.base.results import read_result, write_result
from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import TrajectoryKey, TrajectoryRecord, read_trajectory, trajectories_by_source
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.one_step import predict_trajectory, predict_windows
from shodh_moe.inference.rollout import decode
from shodh_moe.metrics.fields import vrmse
from shodh_moe.runs.plan import count_parameters
from shodh_moe.tokenizer.encoding import trajectory_fields
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory, load_latents

MEASURE_VERSION = 2  # increase it when the same weights would give different numbers


def result_path(audit: AuditConfig, run: Run) -> Path:
    return audit.folder / "results" / f"{run.name}.json"


def measured(audit: AuditConfig, run: Run) -> bool:
    """Whether a result for the current weights and settings exists."""
    return read_result(result_path(audit, run), measure_key(audit, run)) is not None


def measure_key(audit: AuditConfig, run: Run) -> str:
    """Hash of everything a result depends on."""
    if reason := diverged(run.config):
        return fingerprint(MEASURE_VERSION, reason)
    sha = CheckpointReader(last_checkpoint(run.config)).state["sha256"]
    unseen_data = unseen_config(audit).data.model_dump()
    return fingerprint(MEASURE_VERSION, sha, run.name, unseen_data, audit.gradient_samples, audit.probes)


def facts(run: Run) -> dict[str, Any]:
    """The part of a result that describes the run, whether it diverged or not."""
    parameters = count_parameters(run.config, 1)
    return {
        "set": run.set,
        "arm": run.arm,
        "experts": run.experts,
        "seed": run.config.seed,
        "domains": run.domains,
        "run": run.name,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "learning_rate": run.config.training.learning_rate,
        "steps": run.config.training.steps,
        "diverged": diverged(run.config),
    }


def measure(audit: AuditConfig, run: Run) -> Path:
    """Measure a run that has ended. Write its result file (JSON) and, beside it, the arrays of its routing maps (npz).

    Raises:
        UserError: a checkpoint, the data or the latents are missing or damaged.
    """
    if diverged(run.config):
        return _write(audit, run, {})
    config, paths = run.config, resolve_paths(run.config)
    model = load_source(find_source(last_checkpoint(config)))
    transformer, batch, count = model.transformer, config.evaluation.batch_size, audit.gradient_samples
    test = [one for one in load_latents(paths.latents, "test", paths.tokenizer) if one.domain in run.domains]
    train = LatentSamples(
        load_latents(paths.latents, "train", paths.tokenizer), config.model.history, config.data.weights
    )
    samples = LatentSamples(test, config.model.history)
    speeds = local_speeds(config, paths.dataset, "test", test)
    # `test` contains only the domains the run was trained on, but the weights name other domains too.
    unweighted = config.model_copy(update={"data": config.data.model_copy(update={"weights": None})})
    # A dense network may be a mixture with a single expert.
    routing = heldout_routing(transformer, test, speeds, unweighted) if run.experts else None
    records = trajectories_by_source(paths.dataset, "test", config.data.grid, config.data.skip_bad)
    found = {
        "errors": heldout_errors(model, config, records, test, samples),
        "routing": routing,
        "bifurcation": bifurcation(read_run(run_folder(config), "train")) if run.experts else None,
        "swap": swap_growth(transformer, samples, routing, batch),
        "kinship": growth_on_experts(transformer, samples, routing, batch, count) if run.set == "four" else None,
        "place": place_information(transformer, samples, records, batch) if run.experts else {},
        "unseen": _unseen(audit, run, model, unweighted),
        "gradients": [] if run.arm == SINGLE else gradients_over_training(run_folder(config), config, train, count),
        "plasticity": plasticity(transformer, samples, count, batch),
    }
    if routing is not None:
        arrays = routing_maps(model, config, test, samples)
        path = result_path(audit, run).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, allow_pickle=False, **arrays)
    return _write(audit, run, found)


def _write(audit: AuditConfig, run: Run, found: dict[str, Any]) -> Path:
    path = result_path(audit, run)
    write_result(path, measure_key(audit, run), facts(run) | found)
    return path


def _unseen(audit: AuditConfig, run: Run, model: Model, unweighted: Config) -> dict[str, Any] | None:
    """Measurements on unseen geometry; None if no domain of the run has unseen geometry."""
    config = unseen_config(audit)
    paths = resolve_paths(config)
    test = [one for one in load_latents(paths.latents, "test", paths.tokenizer) if one.domain in run.domains]
    if not test:
        return None
    return unseen(model.transformer, test, unweighted, local_speeds(config, paths.dataset, "test", test))


@torch.no_grad()
def heldout_errors(
    model: Model,
    config: Config,
    records: Mapping[TrajectoryKey, TrajectoryRecord],
    test: list[LatentTrajectory],
    samples: LatentSamples,
) -> dict[str, dict[str, float]]:
    """One-step errors of the model and of persistence by domain, means over all windows of the test trajectories.

    The errors (DESIGN 3.6) are ``latent_mse``; ``physical_mse``, that of velocity and pressure decoded in float32 and
    divided by the rms of the tokenizer's training data; and ``velocity_vrmse`` (`vrmse`). Those of persistence have the
    suffix ``_persistence``.

    Args:
        records: the data of the test split, see `trajectories_by_source`.
    """
    tokenizer, h = model.tokenizer, config.model.history
    rms_4111 = torch.stack([tokenizer.velocity_rms] * 3 + [tokenizer.pressure_rms])[:, None, None, None]
    rows: dict[str, list[dict[str, float]]] = {domain: [] for domain in samples.domains}
    for latent in test:
        truth = read_trajectory(records[latent.source, latent.sample])
        solid = torch.from_numpy(truth.solid_1XYZ)
        true, z = trajectory_fields(truth)[:, :4], latent.read()
        size = config.evaluation.batch_size
        predicted_z, _ = predict_trajectory(model.transformer, samples, latent, size)
        predicted = torch.cat([decode(tokenizer, part, solid, torch.float32) for part in predicted_z.split(size)])
        record = {}
        for end, latents, fields in (("", predicted_z, predicted), ("_persistence", z[h - 1 : -1], true[h - 1 : -1])):
            record[f"latent_mse{end}"] = float((latents - z[h:]).square().mean())
            record[f"physical_mse{end}"] = float(((fields - true[h:]) / rms_4111).square().mean())
            record[f"velocity_vrmse{end}"] = float(vrmse(fields[:, :3], true[h:, :3]).mean())
        rows[latent.domain].append(record)
    return {domain: {key: float(np.mean([r[key] for r in own])) for key in own[0]} for domain, own in rows.items()}


@torch.no_grad()
def routing_maps(
    model: Model, config: Config, test: list[LatentTrajectory], samples: LatentSamples
) -> dict[str, np.ndarray]:
    """Arrays of the routing maps, from the middle window of each domain's first test trajectory.

    Returns:
        by ``<domain>/<name>``: ``expert_map``, the expert of each token, int32 [L, x, y, z], and ``solid_fraction``,
        that of the token's cells, float32 [x, y, z]. L is the number of MoE layers.
    """
    arrays: dict[str, np.ndarray] = {}
    patch, h = config.model.patch, config.model.history
    for domain in samples.domains:
        latent = next(one for one in test if one.domain == domain)
        middle = (latent.snapshots - h) // 2
        (found,) = predict_windows(model.transformer, samples, [samples.windows_of(latent)[middle]], 1)
        grid = [size // patch for size in latent.geometry_Cxyz.shape[1:]]
        experts = [layer.expert_N.view(grid) for layer in found.routing]
        arrays[f"{domain}/expert_map"] = torch.stack(experts).int().numpy()
        arrays[f"{domain}/solid_fraction"] = latent.solid_fraction_by_token(patch).float().numpy()
    return arrays
