"""The router's weights before the first step: k-means of what it sees of training samples, without their domains."""

from __future__ import annotations

import torch

from shodh_moe.config import Config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.model import LatentTransformer
from shodh_moe.model.inputs import embedding_inputs, token_grid
from shodh_moe.model.path import Features
from shodh_moe.tokenizer.latents import LatentSamples
from shodh_moe.training.draws import draw_strides

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
    # This rank is alone here, and looks at whole samples, whatever slab it has in training.
    features = Features(path.features.inputs, config.model.moe)
    domains = len(samples.sizes)
    count = -(-SAMPLES // domains) * domains
    sampler = DomainSampler(samples.sizes, count, config.seed, 1, samples.weights, samples.streams)
    picks = sampler.batch(0, 0)
    strides = draw_strides(samples, picks, config.seed, step=0)
    rows = []
    for first in range(0, count, AT_ONCE):
        chosen = slice(first, first + AT_ONCE)
        batch = samples.batch(picks[chosen], strides[chosen])
        z_BSI = embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz, config.model)
        x_MF, _ = features(z_BSI, token_grid(batch.geometry_BCxyz, config.model.patch))
        rows.append(x_MF)
    x_MF = torch.cat(rows)
    path.router.start(x_MF[:: -(-len(x_MF) // ROWS)], config.seed)
