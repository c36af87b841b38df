"""What a token's expert says about its place in samples that contain both a free stream and a porous bed.

Shapes: L layers, B windows, S tokens of a window, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.config import COMPRESSION
from shodh_moe.data import TrajectoryRecord, read_provenance
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.metrics.routing import joint_counts, mutual_information
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory

STREAM, BED = 0, 1


def place_information(
    transformer: LatentTransformer,
    samples: LatentSamples,
    records: Mapping[tuple[str, int], TrajectoryRecord],
    batch_size: int,
) -> dict[str, dict[str, list[float]]]:
    """Mutual information of a token's expert and its place, bed or stream, by domain with beds and by layer, in nats.

    A token lies in the bed if more than half of its cells do. The largest possible value is the entropy of the place.

    Args:
        transformer: the model in evaluation mode.
        records: the samples' data files by file name and number of the trajectory.

    Returns:
        ``{domain: {"information": [L], "entropy": [L]}}``; {} if no domain has beds.
    """
    layers = len(transformer.moe_layers)
    experts = transformer.config.moe.num_experts
    counts: dict[str, Tensor] = {}
    for trajectory in samples.trajectories:
        bed_S = bed_tokens(trajectory, records[trajectory.source, trajectory.sample], transformer.config.patch)
        if bed_S is None:
            continue
        table = counts.setdefault(trajectory.domain, torch.zeros(layers, 2, experts, dtype=torch.float64))
        for found in predict_windows(transformer, samples, samples.windows_of(trajectory), batch_size):
            place_N = bed_S.repeat(len(found.windows))
            for layer, routing in enumerate(found.routing):
                table[layer] += joint_counts(place_N, routing.expert_N.cpu(), 2, experts)
    return {
        domain: {
            "information": [mutual_information(counts_PE) for counts_PE in table],
            "entropy": [float(torch.special.entr(p).sum()) for p in table.sum(2) / table.sum((1, 2))[:, None]],
        }
        for domain, table in counts.items()
    }


def bed_tokens(trajectory: LatentTrajectory, record: TrajectoryRecord, patch: int) -> Tensor | None:
    """`BED` or `STREAM` for each token, int64 [S]; None if the trajectory's file names no ``bed_height``."""
    parameters = read_provenance(record.path).get("parameters")
    height = parameters.get("bed_height") if isinstance(parameters, dict) else None
    if height is None:
        return None
    cells_xyz = [size * COMPRESSION for size in trajectory.solid_fraction_xyz.shape]
    in_bed_XYZ = torch.zeros(cells_xyz)
    in_bed_XYZ[:, :, : int(height) + 1] = 1  # layer 0 is the floor
    share_xyz = F.avg_pool3d(in_bed_XYZ[None, None], COMPRESSION * patch)[0, 0]
    return torch.where(share_xyz > 0.5, BED, STREAM).flatten()
