"""Run three optimizer steps on one rank with the given overrides; write weights and gradient norms."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from shodh_moe.config.load import load_config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.losses import error_norms, total_loss
from shodh_moe.training.pretrain import latent_engine
from shodh_moe.training.process_group import init_distributed

_, folder, name, *overrides = sys.argv
config = load_config(Path(folder, "config.yaml"), overrides)
init_distributed()
samples = LatentSamples(load_latents(Path(folder, "latents"), "train"), config.model.history)
engine = latent_engine(config, 6, [2, 2, 2])
torch.nn.init.normal_(engine.model.head.weight, std=0.1, generator=torch.Generator().manual_seed(7))
for shard in engine._shards:  # ZeRO copied the weights before they were initialized here
    shard.of(shard.master).copy_(shard.parameter.detach().view(-1)[shard.start :][: shard.count])
sampler = DomainSampler(samples.sizes, config.training.batch_size, config.seed)
norms: list[float] = []
for micro in range(3 * config.training.accumulation):
    batch = samples.batch(sampler.batch(micro, 0))
    norm_BU = error_norms(config.training.loss, batch, None)
    loss = total_loss([engine(*batch.inputs)], batch, config, norm_BU).loss
    step = engine.step(loss, 1e-2)
    norms += [step.norm] if step else []
tensors = {key: value.detach().clone().contiguous() for key, value in engine.model.named_parameters()}
tensors["norms"] = torch.tensor(norms, dtype=torch.float64)
save_file(tensors, Path(folder, f"{name}.safetensors"))
dist.destroy_process_group()
