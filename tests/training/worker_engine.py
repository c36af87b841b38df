"""One rank of test_engine: run three optimizer steps at a given EP size and write the results."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from shodh_moe.base.parameters import marks
from shodh_moe.config.load import load_config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.engine import Step
from shodh_moe.training.losses import error_norms, total_loss
from shodh_moe.training.pretrain import latent_engine
from shodh_moe.training.process_group import init_distributed

_, folder, ep_size, *overrides = sys.argv
folder = Path(folder)
config = load_config(folder / "config.yaml", [f"parallel.ep_size={ep_size}", *overrides])
init_distributed()
rank, world = dist.get_rank(), dist.get_world_size()
samples = LatentSamples(load_latents(folder / "latents", "train"), config.model.history)
engine = latent_engine(config, 6, [2, 2, 2], samples)
generator = torch.Generator().manual_seed(7)
for parameter in engine.model.head.parameters():
    torch.nn.init.normal_(parameter, std=0.1, generator=generator)
sampler = DomainSampler(samples.sizes, config.training.batch_size, config.seed, world)

gradients: dict[str, torch.Tensor] = {}
norms, losses, dropped = [], [], []
clip = engine._clipped


def keep_gradients(stop: bool) -> Step:
    """Copy the gradients; called between DeepSpeed's reduction and our clipping."""
    if not gradients:
        gradients.update({name: p.grad.clone() for name, p in engine.model.named_parameters()})
    return clip(stop)


engine._clipped = keep_gradients  # type: ignore[method-assign]
for step in range(3):
    batch = samples.batch(sampler.batch(step, rank))
    prediction = engine(*batch.inputs)
    loss = total_loss([prediction], batch, config, error_norms(config.training.loss, batch, None)).loss
    norms.append(engine.step(loss, 1e-2).norm)
    losses.append(float(loss.detach()))
    dropped.append(sum(int((~layer.kept_N).sum()) for layer in prediction.routing))


def all_experts(local: torch.Tensor) -> torch.Tensor:
    """[L, ...] of each rank -> [E, ...], in global expert order."""
    parts = [torch.empty_like(local) for _ in range(engine.ep.size)]
    dist.all_gather(parts, local.detach().contiguous(), group=engine.ep.group)
    return torch.cat(parts)


out = {f"grad/{name}": value for name, value in gradients.items()}
for name, parameter in engine.model.named_parameters():
    out[f"local/{name}"] = parameter.detach().clone()
    out[f"logical/{name}"] = all_experts(parameter) if marks(parameter).sharded else parameter.detach().clone()
    if marks(parameter).sharded:
        out[f"logical_grad/{name}"] = all_experts(gradients[name])
out["norms"] = torch.tensor(norms, dtype=torch.float64)
out["losses"] = torch.tensor(losses, dtype=torch.float64)
out["dropped"] = torch.tensor(dropped)
save_file({k: v.contiguous() for k, v in out.items()}, folder / f"ep{ep_size}_rank{os.environ['RANK']}.safetensors")
dist.barrier()
dist.destroy_process_group()
