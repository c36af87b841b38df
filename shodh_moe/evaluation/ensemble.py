"""Measure an ensemble on the test split: errors of its mean, its spread, and the coverage of its intervals.

Shapes: M members, N steps, K fluid values of a velocity, 3 velocity components, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shodh_moe.base.progress import progress
from shodh_moe.config import Config
from shodh_moe.config.paths import Paths
from shodh_moe.data import read_trajectory, trajectories_by_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.rollout import decode, rollout
from shodh_moe.metrics.ensemble import LEVELS, covered, half_width, mean_and_spread
from shodh_moe.metrics.fields import nrmse
from shodh_moe.tokenizer.latents import LatentSamples, load_latents, samples_of

MOST = 2**18  # largest number of values of one velocity that a factor is fitted to


class _Step(NamedTuple):
    """One step of one trajectory: errors of the mean and of single members, relative spread, and errors of values.

    Attributes:
        error_K, spread_K: absolute error of the mean and spread at each fluid value.
    """

    step: int
    mean: float
    members: float
    spread: float
    error_K: Tensor
    spread_K: Tensor


@torch.no_grad()
def measure_members(config: Config, members: list[Model], paths: Paths) -> dict[str, dict[str, Any]]:
    """Roll out all members from the start of each test trajectory; return these entries for each domain.

    ``members``: their number. By step, of the velocity, means over trajectories: ``nrmse_mean`` of the ensemble's mean,
    ``nrmse_members`` the mean over the members' own, ``spread`` the rms spread over the rms truth, and
    ``coverage_<p>`` the share of the fluid values within the interval of `half_width` for p %. ``factor_<p>`` is the
    factor on the spread that holds p % of the values of the validation split instead, and ``coverage_<p>_calibrated``
    the share of the test values that it holds.
    """
    test, valid = (
        samples_of(config, load_latents(paths.latents, split, paths.tokenizer), split) for split in ("test", "valid")
    )
    found: dict[str, dict[str, Any]] = {}
    for domain in test.domains:
        ratios: dict[int, list[Tensor]] = {}
        for one in _steps(config, members, paths, valid, "valid", domain):
            ratio_K = (one.error_K / one.spread_K.clamp(min=torch.finfo(torch.float64).tiny)).float()
            ratios.setdefault(one.step, []).append(ratio_K[:: -(-len(ratio_K) // MOST)])
        factors = {
            step: torch.cat(parts).double().quantile(torch.tensor(LEVELS).double()) for step, parts in ratios.items()
        }
        rows: dict[int, list[list[float]]] = {}
        for one in _steps(config, members, paths, test, "test", domain):
            if one.step not in factors:  # validation trajectories may be shorter
                break
            plain = [covered(one.error_K, one.spread_K, half_width(level, len(members))) for level in LEVELS]
            own = [covered(one.error_K, one.spread_K, float(factor)) for factor in factors[one.step]]
            rows.setdefault(one.step, []).append([one.mean, one.members, one.spread, *plain, *own])
        means = torch.tensor([rows[step] for step in sorted(rows)], dtype=torch.float64).mean(1).T.tolist()
        names = ["nrmse_mean", "nrmse_members", "spread", *(f"coverage_{100 * level:.0f}" for level in LEVELS)]
        names += [f"coverage_{100 * level:.0f}_calibrated" for level in LEVELS]
        found[domain] = {"members": len(members), **dict(zip(names, means, strict=True))}
        for number, level in enumerate(LEVELS):
            found[domain][f"factor_{100 * level:.0f}"] = [float(factors[step][number]) for step in sorted(rows)]
    return found


def _steps(
    config: Config, members: list[Model], paths: Paths, samples: LatentSamples, split: str, domain: str
) -> Iterator[_Step]:
    """Roll out all members from the start of each trajectory of a domain, and compare with the truth."""
    h, s = config.model.history, config.measured_stride
    records = trajectories_by_source(paths.dataset, split, config.data.grid, config.data.skip_bad)
    own = [one for one in samples.trajectories if one.domain == domain and not one.copy]
    steps = min(config.evaluation.rollout_steps, (min(one.snapshots for one in own) - 1) // s - h + 1)
    for latent in progress(own, f"ensemble {split} {domain}", len(own)):
        truth = read_trajectory(records[latent.source, latent.sample])
        solid_1XYZ = torch.from_numpy(truth.solid_1XYZ)
        fluid_3XYZ = (solid_1XYZ < 0.5).expand(3, -1, -1, -1)
        given, geometry = latent.read(0, h * s, s)[None], latent.geometry_Cxyz[None]
        flows = [rollout(one.transformer, given, geometry, samples.context(domain)) for one in members]
        for step, found_M in enumerate(islice(zip(*flows, strict=True), steps)):
            velocities = [
                decode(one.tokenizer, z_BCxyz, solid_1XYZ)[0, :3] for one, z_BCxyz in zip(members, found_M, strict=True)
            ]
            mean, spread = mean_and_spread(velocities)
            true = torch.from_numpy(truth.velocity_T3XYZ[(h + step) * s]).double()
            single = sum(float(nrmse(one, true)) for one in velocities) / len(members)
            size = float((spread.square().mean() / true.square().mean()).sqrt())
            error_K = (true - mean).abs()[fluid_3XYZ]
            yield _Step(step, float(nrmse(mean, true)), single, size, error_K, spread[fluid_3XYZ])
