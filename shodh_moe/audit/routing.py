"""Routing of held-out tokens, what it reveals about the domain, and the step at which training split the domains.

Shapes: L layers, D domains, E experts, C categories of a token, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.audit.windows import all_windows, latent_errors
from shodh_moe.base.errors import UserError
from shodh_moe.config import COMPRESSION, Config
from shodh_moe.data import TrajectoryKey, TrajectoryRecord, read_snapshots, trajectories_by_source
from shodh_moe.evaluation.evaluate import SOLID_CATEGORIES
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.metrics.routing import (
    PURITY_THRESHOLD,
    bifurcated,
    conditional_mutual_information,
    joint_counts,
    mutual_information,
    solid_fraction_category,
    summarise_routing,
)
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory

SPEED_CATEGORIES = 5  # quartiles of the tokens that contain fluid, and the tokens that are all solid
SNAPSHOTS_AT_ONCE = 8  # number of snapshots that `local_speed` reads together
MOST_RECORDS = 100
Speeds = dict[TrajectoryKey, Tensor]  # `local_speed` of each trajectory


def heldout_routing(
    transformer: LatentTransformer, trajectories: list[LatentTrajectory], speeds: Speeds | None, config: Config
) -> dict[str, Any] | None:
    """`summarise_routing` over all one-step windows without dropping tokens, plus mutual information.

    Each layer's ``mutual_information``, in nats, is that between a token's expert and its ``domain``,
    ``solid_fraction`` and ``speed`` (mean |u| of its cells); ``domain_given_solid_fraction`` and ``domain_given_speed``
    are conditional mutual information between expert and domain.

    The solid fraction has 4 categories (`solid_fraction_category`). The speed has 5: quartiles over the tokens of all
    domains that contain fluid, and the tokens that are all solid. It is that of the window's newest snapshot, because
    the router sees that one and older ones but never the one to predict.

    Args:
        transformer: the model in evaluation mode.
        speeds: `local_speeds` of the trajectories; if None, values that need them are None.
        config: provides history, patch, ``data.weights`` (the domains to use) and ``evaluation.batch_size``.

    Returns:
        None for a dense model.
    """
    if not transformer.moe_layers:
        return None
    samples = LatentSamples(trajectories, config.model.history, config.data.weights)
    solid = [_solid_category(one, config.model.patch) for one in samples.trajectories]
    kinds = {"solid_fraction": SOLID_CATEGORIES}
    if speeds is not None:
        kinds["speed"] = SPEED_CATEGORIES
        speed = _speed_categories(samples, speeds, solid)
    layers, domains, experts = len(transformer.moe_layers), len(samples.domains), config.model.moe.num_experts
    tables = {name: torch.zeros(layers, c, domains, experts, dtype=torch.float64) for name, c in kinds.items()}
    for found in predict_windows(transformer, samples, all_windows(samples), config.evaluation.batch_size):
        places = [samples.index[domain][index] for domain, index in found.windows]
        category = {"solid_fraction": torch.stack([solid[number] for number, _ in places]).flatten()}
        if speeds is not None:
            category["speed"] = torch.stack([speed[number][start] for number, start in places]).flatten()
        domain_N = found.batch.domain_B.repeat_interleave(solid[0].numel())
        for layer, routing in enumerate(found.routing):
            expert_N = routing.expert_N.cpu()
            for name, c in kinds.items():
                counts = joint_counts(category[name] * domains + domain_N, expert_N, c * domains, experts)
                tables[name][layer] += counts.view(c, domains, experts)
    counts_LDE = tables["solid_fraction"].sum(1)
    result = summarise_routing([dict(zip(samples.domains, counts_DE, strict=True)) for counts_DE in counts_LDE])
    for layer, record in enumerate(result["layers"]):
        information = record["mutual_information"]
        for name in ("solid_fraction", "speed"):
            counts_CDE = tables[name][layer] if name in tables else None
            information[name] = None if counts_CDE is None else mutual_information(counts_CDE.sum(1))
            given = None if counts_CDE is None else conditional_mutual_information(counts_CDE)
            information[f"domain_given_{name}"] = given
    return result


def _solid_category(trajectory: LatentTrajectory, patch: int) -> Tensor:
    """Category of each token's solid fraction [x, y, z]; the last category is all solid."""
    return solid_fraction_category(trajectory.solid_fraction_by_token(patch), SOLID_CATEGORIES)


def _speed_categories(samples: LatentSamples, speeds: Speeds, solid: list[Tensor]) -> list[Tensor]:
    """Category of each token's speed, one tensor [windows, x, y, z] per trajectory."""
    newest = [speeds[one.source, one.sample][samples.history - 1 : one.snapshots - 1] for one in samples.trajectories]
    wet = [(category < SOLID_CATEGORIES - 1).expand_as(u) for u, category in zip(newest, solid, strict=True)]
    fluid = torch.cat([u[where] for u, where in zip(newest, wet, strict=True)])
    # numpy, because torch.quantile refuses more than 16 million values.
    edges = torch.from_numpy(np.quantile(fluid.numpy(), [0.25, 0.5, 0.75]).astype(np.float32))
    return [
        torch.where(where, torch.bucketize(u.contiguous(), edges, right=True), SPEED_CATEGORIES - 1)
        for u, where in zip(newest, wet, strict=True)
    ]


def bifurcation(records: Iterable[dict[str, Any]], threshold: float = PURITY_THRESHOLD) -> dict[str, Any] | None:
    """Find the step at which the routers split the domains for good, from the training records of a run.

    Returns:
        ``step``: step of the first record from which every layer stays bifurcated (`bifurcated`) up to the last record;
        None if the last record is not bifurcated. ``loads``: at most 100 evenly thinned records, including the last
        one, with ``step`` and ``load`` (for each layer {domain: [E]}). None if no record has routing (a dense model).
    """
    kept = [
        {"step": record["step"], "load": [layer["load"] for layer in record["routing"]]}
        for record in records
        if record.get("routing")
    ]
    if not kept:
        return None
    step = None
    for record in reversed(kept):
        if not all(bifurcated(load, threshold) for load in record["load"]):
            break
        step = record["step"]
    every = -(-len(kept) // MOST_RECORDS)
    return {"step": step, "loads": kept[::-1][::every][::-1]}


def unseen(
    transformer: LatentTransformer, trajectories: list[LatentTrajectory], config: Config, speeds: Speeds | None = None
) -> dict[str, Any]:
    """``errors`` (`latent_errors`) and ``routing`` (`heldout_routing`) on trajectories with unseen geometries.

    The trajectories must cover the domains of training, because the oracle router uses the index of the domain.
    """
    samples = LatentSamples(trajectories, config.model.history, config.data.weights)
    return {
        "errors": latent_errors(transformer, samples, config.evaluation.batch_size),
        "routing": heldout_routing(transformer, trajectories, speeds, config),
    }


def local_speed(record: TrajectoryRecord, patch: int, compression: int = COMPRESSION) -> Tensor:
    """Mean of |u| over the cells of each token, including solid cells: float32 [T, x, y, z] in the data's units.

    A token is a cube with ``patch * compression`` cells along each axis; T is the number of snapshots.

    Raises:
        UserError: see `read_snapshots`.
    """
    parts = []
    for start in range(0, record.n_snapshots, SNAPSHOTS_AT_ONCE):
        fields_T4XYZ, _ = read_snapshots(record, start, min(start + SNAPSHOTS_AT_ONCE, record.n_snapshots))
        speed_T1XYZ = torch.from_numpy(fields_T4XYZ[:, :3]).norm(dim=1, keepdim=True)
        parts.append(F.avg_pool3d(speed_T1XYZ, patch * compression)[:, 0])
    return torch.cat(parts)


def local_speeds(config: Config, dataset: Path, split: str, trajectories: Iterable[LatentTrajectory]) -> Speeds:
    """`local_speed` of the data that each latent trajectory of a split was encoded from.

    Raises:
        UserError: a trajectory's data are not in ``dataset``, or cannot be read.
    """
    records = trajectories_by_source(dataset, split, config.data.grid, config.data.skip_bad)
    speeds = {}
    for one in trajectories:
        if (one.source, one.sample) not in records:
            raise UserError(
                f"trajectory {one.sample} of {one.source} has latents but is not in the {split} split of {dataset}: "
                "give the dataset that the latents were made from"
            )
        speeds[one.source, one.sample] = local_speed(records[one.source, one.sample], config.model.patch)
    return speeds
