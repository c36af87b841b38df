"""Train a peer for a given wall time.

The loss is what the benchmark measures: the relative L2 norm of the error of the next snapshot, mean over samples and
over the fields velocity and pressure (`LpLoss` of FNO's and DPOT's code).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import FieldStats
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.forecast.budget import TimeBudget, learning_rate
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import Windows, dataset_records
from shodh_moe.forecast.errors import FIELDS
from shodh_moe.forecast.forecasters import device
from shodh_moe.forecast.peers import PeerModel, make_peer
from shodh_moe.forecast.plan import Training

BETAS = (0.9, 0.999)
GRAD_CLIP = 1.0  # largest norm of the gradients
WEIGHTS = "weights.safetensors"


def new_peer(bench: ForecastConfig, training: Training, dataset: Path) -> PeerModel:
    """Make the network of a training with its initial weights."""
    network = make_peer(dict(bench.peers.items())[training.model], bench.history, training.seed)
    return PeerModel(network, bench.history, FieldStats.load(dataset))


def train_peer(bench: ForecastConfig, training: Training) -> tuple[PeerModel, dict[str, Any]]:
    """Train until the time is over.

    Reading data counts; starting the process and making the network do not.

    Returns:
        the network; and ``steps``, ``seconds``, ``samples`` (all trained on), and ``diverged``: the step at which the
        loss was not finite, else None.
    """
    peer = dict(bench.peers.items())[training.model]
    dataset = resolve_paths(bench.base).dataset
    windows = Windows(dataset_records(bench.base, dataset, "train"), bench.history)
    sampler = DomainSampler(windows.sizes, peer.batch_size, training.seed)
    model = new_peer(bench, training, dataset).to(device()).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=BETAS, weight_decay=peer.weight_decay
    )
    print(f"training {training.name} for {training.seconds(bench):g} s", flush=True)
    budget, steps, diverged = TimeBudget(training.seconds(bench)), 0, None
    for batch in windows.batches(sampler):
        if (share := budget.share) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, training.learning_rate)
        loss = _loss(model, batch.to(device()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        steps += 1
        if not loss.isfinite():
            diverged = steps
            break
    found = {"steps": steps, "seconds": budget.spent, "samples": steps * peer.batch_size, "diverged": diverged}
    return model, found


def _loss(model: PeerModel, windows_BT5XYZ: Tensor) -> Tensor:
    given, target = windows_BT5XYZ[:, :-1, :4], windows_BT5XYZ[:, -1, :4]
    error = (model(given, windows_BT5XYZ[:, -1, 4:]) - target) / model.scale_4111
    true = target / model.scale_4111
    ratios = [
        torch.linalg.vector_norm(error[:, part], dim=(1, 2, 3, 4))
        / torch.linalg.vector_norm(true[:, part], dim=(1, 2, 3, 4)).clamp(min=1e-6)
        for part in FIELDS.values()
    ]
    return torch.stack(ratios).mean()
