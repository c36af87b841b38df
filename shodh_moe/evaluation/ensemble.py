"""Measure an ensemble on the test split: errors of its mean, its spread, and the coverage of its intervals.

Shapes: M members, N steps, 3 velocity components, X Y Z space.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from shodh_moe.base.progress import progress
from shodh_moe.config import Config
from shodh_moe.config.paths import Paths
from shodh_moe.data import read_trajectory, trajectories_by_source
from shodh_moe.inference.loading import Models
from shodh_moe.inference.rollout import decode, rollout
from shodh_moe.metrics.ensemble import LEVELS, coverage, mean_and_spread
from shodh_moe.metrics.fields import nrmse
from shodh_moe.tokenizer.latents import LatentSamples, load_latents


@torch.no_grad()
def measure_members(config: Config, members: list[Models], paths: Paths) -> dict[str, dict[str, Any]]:
    """Roll out all members from the start of each test trajectory; return these entries for each domain.

    ``members``: their number. By step, of the velocity, means over trajectories: ``nrmse_mean`` of the ensemble's mean,
    ``nrmse_members`` the mean over the members' own, ``spread`` the rms spread over the rms truth, and
    ``coverage_<p>`` the share of the values within the interval for p %, solid voxels left out.
    """
    h = config.model.history
    test = LatentSamples(load_latents(paths.latents, "test", paths.tokenizer), h, config.data.weights)
    records = trajectories_by_source(paths.dataset, "test", config.data.grid, config.data.skip_bad)
    found: dict[str, dict[str, Any]] = {}
    for domain in test.domains:
        own = [one for one in test.trajectories if one.domain == domain]
        steps = min(config.evaluation.rollout_steps, min(one.snapshots for one in own) - h)
        rows = []
        for latent in progress(own, f"ensemble {domain}", len(own)):
            truth = read_trajectory(records[latent.source, latent.sample])
            solid_1XYZ = torch.from_numpy(truth.solid_1XYZ)
            fluid_3XYZ = (solid_1XYZ < 0.5).expand(3, -1, -1, -1)
            given, geometry = latent.read(0, h)[None], latent.geometry_Cxyz[None]
            flows = [rollout(one.transformer, given, geometry, test.context(domain)) for one in members]
            for step, found_M in enumerate(islice(zip(*flows, strict=True), steps)):
                velocities = [
                    decode(one.tokenizer, z_BCxyz, solid_1XYZ)[0, :3]
                    for one, z_BCxyz in zip(members, found_M, strict=True)
                ]
                mean, spread = mean_and_spread(velocities)
                true = torch.from_numpy(truth.velocity_T3XYZ[h + step]).double()
                inside = [
                    coverage(mean[fluid_3XYZ], spread[fluid_3XYZ], true[fluid_3XYZ], level, len(members))
                    for level in LEVELS
                ]
                single = sum(float(nrmse(one, true)) for one in velocities) / len(members)
                size = float((spread.square().mean() / true.square().mean()).sqrt())
                rows.append([float(nrmse(mean, true)), single, size, *inside])
        means = torch.tensor(rows, dtype=torch.float64).view(len(own), steps, -1).mean(0).T.tolist()
        names = ["nrmse_mean", "nrmse_members", "spread", *(f"coverage_{100 * level:.0f}" for level in LEVELS)]
        found[domain] = {"members": len(members), **dict(zip(names, means, strict=True))}
    return found
