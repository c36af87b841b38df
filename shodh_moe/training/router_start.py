"""The router's weights before the first step: k-means of what it sees of training samples, without their domains."""

from __future__ import annotations

import torch

from shodh_moe.config import Config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples

SAMPLES = 512  # number of training samples to look at, drawn like those of a training batch
ROWS = 4096  # largest number of rows for k-means


@torch.no_grad()
def start_router(model: LatentTransformer, samples: LatentSamples, config: Config) -> None:
    """Set the initial weights of the model's path router from training samples; the same samples give the same weights.

    Raises:
        UserError: the latents cannot be read.
    """
    path = model.path
    assert path is not None
    size = config.training.batch_size
    sampler = DomainSampler(samples.sizes, size, config.seed, 1, samples.weights, samples.streams)
    rows = []
    for step in range(-(-SAMPLES // size)):
        batch = samples.batch(sampler.batch(step, 0))
        x_MF, _ = path.features(model.embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz))
        rows.append(x_MF)
    x_MF = torch.cat(rows)
    path.router.start(x_MF[:: -(-len(x_MF) // ROWS)], config.seed)
