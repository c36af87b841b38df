"""The router's weights before the first step: k-means of what it sees of training samples, without their domains."""

from __future__ import annotations

import torch

from shodh_moe.config import Config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.model import LatentTransformer
from shodh_moe.model.path import Features
from shodh_moe.tokenizer.latents import LatentSamples

SAMPLES = 512  # number of training samples to look at, divided among the domains like those of a training batch
AT_ONCE = 8  # samples in memory
ROWS = 4096  # largest number of rows for k-means


@torch.no_grad()
def start_router(model: LatentTransformer, samples: LatentSamples, config: Config) -> None:
    """Set the initial weights of the model's path router from training samples.

    They depend on the samples and the seed, but not on the batch size, so every layout of ranks starts alike.

    Raises:
        UserError: the latents cannot be read.
    """
    path = model.path
    assert path is not None
    # Of whole samples, whatever slab this rank has.
    features = Features(path.features.inputs, path.features.grid, config.model.moe)
    domains = len(samples.sizes)
    count = -(-SAMPLES // domains) * domains
    sampler = DomainSampler(samples.sizes, count, config.seed, 1, samples.weights, samples.streams)
    picks = sampler.batch(0, 0)
    rows = []
    for first in range(0, count, AT_ONCE):
        batch = samples.batch(picks[first : first + AT_ONCE])
        x_MF, _ = features(model.embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz))
        rows.append(x_MF)
    x_MF = torch.cat(rows)
    path.router.start(x_MF[:: -(-len(x_MF) // ROWS)], config.seed)
