"""The path router before the first step."""

from __future__ import annotations

import torch

from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.router_start import start_router
from tests.training.synthetic import write_latents


def test_the_start_does_not_depend_on_the_batch_size(tmp_path):
    write_latents(tmp_path)
    samples = LatentSamples(load_latents(tmp_path, "train"), 2)
    started = []
    for size in (2, 6):
        config = Config.model_validate(
            {"model": {"dim": 24, "depth": 1, "heads": 2}, "training": {"batch_size": size}, "seed": 3}
        )
        model = LatentTransformer(config.model, samples.trajectories[0].z.shape[1], 3, ExpertParallel())
        before = {name: tensor.clone() for name, tensor in model.path.router.state_dict().items()}
        start_router(model, samples, config)
        started.append(model.path.router.state_dict())
        assert not torch.equal(started[-1]["prototypes_ER"], before["prototypes_ER"])
    for name, tensor in started[0].items():
        assert torch.equal(started[1][name], tensor), name
