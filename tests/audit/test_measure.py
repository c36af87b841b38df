"""The errors that the audit measures, compared with their definitions, and the maps of the routing."""

from __future__ import annotations

import pytest
import torch

from shodh_moe.audit.measure import heldout_errors, routing_maps
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import list_trajectories, read_trajectory, trajectories_by_source
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.rollout import decode
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer.encoding import trajectory_fields
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests.trained import HISTORY, SNAPSHOTS, make_run, run_config


@torch.no_grad()
def test_errors_are_means_over_the_windows_of_the_test_trajectories(tmp_path):
    make_run(tmp_path)
    config = run_config(tmp_path)
    paths = resolve_paths(config)
    pipeline.make_latents(config, paths)
    model = load_source(find_source(tmp_path / "runs" / "trained"))
    test = load_latents(paths.latents, "test", paths.tokenizer)
    samples = LatentSamples(test, HISTORY)
    records = trajectories_by_source(paths.dataset, "test")
    errors = heldout_errors(model, config, records, test, samples)

    fields = {r.domain: trajectory_fields(read_trajectory(r)) for r in list_trajectories(paths.dataset, "test")}
    tokenizer = model.tokenizer
    scale = torch.tensor([float(tokenizer.velocity_rms)] * 3 + [0.5]).view(4, 1, 1, 1)
    windows = SNAPSHOTS - HISTORY
    assert set(errors) == {"calm", "wild"}
    for number, domain in enumerate(sorted(errors)):
        batch = samples.batch([(number, n) for n in range(windows)])
        history, geometry, target = batch.history_BHCxyz, batch.geometry_BCxyz, batch.target_BCxyz
        z = model.transformer(history, geometry).latent_BCxyz
        true, before = fields[domain][HISTORY:, :4], fields[domain][HISTORY - 1 : -1, :4]
        predicted = decode(tokenizer, z, fields[domain][0, 4:]).float()
        fluctuation = true[:, :3] - true[:, :3].mean((2, 3, 4), keepdim=True)
        variance = fluctuation.square().mean((1, 2, 3, 4))

        def vrmse(velocity: torch.Tensor, true=true, variance=variance) -> float:
            return float(((velocity - true[:, :3]).square().mean((1, 2, 3, 4)) / variance).sqrt().mean())

        assert errors[domain] == pytest.approx(
            {
                "latent_mse": float((z - target).square().mean()),
                "latent_mse_persistence": float((history[:, -1] - target).square().mean()),
                "physical_mse": float(((predicted - true) / scale).square().mean()),
                "physical_mse_persistence": float(((before - true) / scale).square().mean()),
                "velocity_vrmse": vrmse(predicted[:, :3]),
                "velocity_vrmse_persistence": vrmse(before[:, :3]),
            },
            rel=1e-4,
        )

    maps = routing_maps(model, config, test, samples)
    for number, domain in enumerate(samples.domains):
        history, geometry, _ = samples.batch([(number, windows // 2)]).inputs
        routing = model.transformer(history, geometry).routing
        assert maps[f"{domain}/expert_map"].tolist() == [r.expert_N.view(2, 1, 3).tolist() for r in routing]
        assert (maps[f"{domain}/solid_fraction"] == test[number].solid_fraction_xyz.numpy()).all()
