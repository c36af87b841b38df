"""One rank of test_engine: run two float64 steps; fail if DeepSpeed's global state changes outside of them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from shodh_moe.config.load import load_config
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.deepspeed_patches import in_float64
from shodh_moe.training.losses import error_norms, total_loss
from shodh_moe.training.pretrain import latent_engine
from shodh_moe.training.process_group import init_distributed


def state() -> dict[str, Any]:
    return {
        "accelerator": "supported_dtypes" in vars(get_accelerator()),
        "types": get_accelerator().supported_dtypes(),
        "engine": dict(vars(DeepSpeedEngine)),
        "optimizer": dict(vars(ZeROOptimizer)),
        "operations": dict(deepspeed.ops.__compatible_ops__),
    }


def train(folder: Path, stage: str) -> None:
    config = load_config(folder / "config.yaml", ["training.precision=float64", f"parallel.zero_stage={stage}"])
    samples = LatentSamples(load_latents(folder / "latents", "train"), config.model.history)
    sampler = DomainSampler(samples.sizes, config.training.batch_size, config.seed, dist.get_world_size())
    engine = latent_engine(config, 6, [2, 2, 2])
    assert state() == before
    for step in range(2):
        batch = samples.batch(sampler.batch(step, dist.get_rank())).to("cpu", torch.float64)
        norm_BU = error_norms(config.training.loss, batch, None)
        result = engine.step(total_loss([engine(*batch.inputs)], batch, config, norm_BU).loss, 1e-3)
        assert result is not None
        assert result.applied
        assert state() == before
    assert all(fragment.values.dtype == torch.float64 for fragment in engine.fragments())


before = state()
init_distributed()
assert state() == before
patterns = [entry[1].pattern for entry in warnings.filters if entry[1]]
assert patterns.count(".*all_gather_into_tensor.*deprecated") == 1
for stage in ("0", "1", "2"):
    train(Path(sys.argv[-1]), stage)


def fail_inside() -> None:
    with in_float64(True):
        assert torch.float64 in get_accelerator().supported_dtypes()
        assert state() != before
        raise RuntimeError("inside")


with pytest.raises(RuntimeError, match="inside"):
    fail_inside()
assert state() == before
dist.barrier()
dist.destroy_process_group()
