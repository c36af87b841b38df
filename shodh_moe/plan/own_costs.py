"""What the code of a training takes besides computing: measured with networks of a few numbers.

Such a network has the operations of a large one, but nothing to compute. Its passes at two depths give the time of an
operation, its optimizer steps the time of a tensor of parameters and of a step.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.distributed as dist

from shodh_moe.base.boundaries import UNKNOWN_CODE
from shodh_moe.config import Config
from shodh_moe.kernels import combine, dispatch, topk_gating
from shodh_moe.plan.clock import seconds
from shodh_moe.plan.operations import work_of
from shodh_moe.tokenizer.latents import Batch, LatentSamples, LatentTrajectory
from shodh_moe.training.forward import forward
from shodh_moe.training.pretrain import latent_engine

DEPTHS = (1, 8)  # far apart, because differences of times are noisy
MICRO_BATCHES = (1, 3)
ROUNDS = 8  # at least
CHANNELS, GRID, SAMPLES = 2, 2, 2


def own_costs(device: torch.device) -> dict[str, Any]:
    """Return the times ``operation`` to ``step``, ``sample`` and ``reading`` of `Rates`, by name (collective)."""
    kernel = _kernel(device)
    passes = [_pass(depth, False, device) for depth in DEPTHS]
    block = max(passes[1] - passes[0], 0.0) / (DEPTHS[1] - DEPTHS[0])
    again = (_pass(DEPTHS[1], True, device) - _pass(DEPTHS[0], True, device)) / (DEPTHS[1] - DEPTHS[0])
    costs = [cost for one in _work(1).block for cost in (one.forward, one.backward) if one.kind != "kernel"]
    kernels = sum(one.forward.calls + one.backward.calls for one in _work(1).block if one.kind == "kernel")
    calls = sum(cost.calls for cost in costs)
    one = torch.ones(1, device=device)
    # The difference of two measurements may be noise; an operation takes at least as long as one without autograd.
    operation = max((block - kernels * kernel) / calls, seconds(lambda: one * one, device, 50))
    forward_calls = sum(one.forward.calls for one in _work(1).block if one.kind != "kernel")
    recompute = max(again - block - forward_calls * operation - kernels / 2 * kernel, 0.0)
    tensor, step = [], 0.0
    for stage in (0, 1, 2):
        # A step less its passes.
        updates = [_step(depth, stage, 1, device) - one for depth, one in zip(DEPTHS, passes, strict=True)]
        tensors = [_work(depth).tensors for depth in DEPTHS]
        tensor.append(max(updates[1] - updates[0], 0.0) / (tensors[1] - tensors[0]))
        if not stage:
            step = max(updates[0] - tensor[0] * tensors[0], 0.0)
    sample, rate = _reading(device)
    named = {"operation": operation, "kernel": kernel, "recompute": recompute, "tensor": tuple(tensor), "step": step}
    return {**named, "sample": sample, "reading": rate}


def _config(depth: int, stage: int, accumulation: int, checkpointing: bool = False) -> Config:
    moe = {"num_experts": 1, "expert_hidden": 8, "attention": "low_rank", "attention_rank": 2}
    training = {"batch_size": SAMPLES, "accumulation": accumulation, "activation_checkpointing": checkpointing}
    return Config.model_validate(
        {
            "data": {"grid": [8 * GRID] * 3},
            "tokenizer": {"latent_channels": CHANNELS},
            "model": {"dim": 12, "depth": depth, "heads": 2, "moe": moe},
            "training": {**training, "loss": "mse"},
            "parallel": {"zero_stage": stage, "ep_size": 1},
        }
    )


def _work(depth: int) -> Any:
    return work_of(_config(depth, 0, 1), 1, dist.get_world_size(), fused=torch.cuda.is_available())


def _pass(depth: int, checkpointing: bool, device: torch.device) -> float:
    """Time of the forward and backward pass of a micro-batch: that by which further ones prolong a step."""
    few, many = MICRO_BATCHES
    more = _step(depth, 0, many, device, checkpointing) - _step(depth, 0, few, device, checkpointing)
    return more / (many - few)


def _step(depth: int, stage: int, accumulation: int, device: torch.device, checkpointing: bool = False) -> float:
    """Time of a training step of a network of a few numbers."""
    config = _config(depth, stage, accumulation, checkpointing)
    engine = latent_engine(config, CHANNELS)
    latents = torch.randn(SAMPLES, config.model.history + 2, CHANNELS, GRID, GRID, GRID, device=device)
    label_B = torch.zeros(SAMPLES, dtype=torch.int64, device=device)
    boundary_B32 = torch.full((SAMPLES, 3, 2), UNKNOWN_CODE, device=device)
    batch = Batch(latents[:, :-2], latents[:, -2], latents[:, -1:], label_B, label_B + 1, boundary_B32)

    def step() -> None:
        for _ in range(accumulation):
            losses, _, _ = forward(engine, batch, config)
            engine.step(losses.loss, 1e-4)

    gc.collect()  # the engine before this one
    return seconds(step, device, 1, ROUNDS)


def _kernel(device: torch.device) -> float:
    """Time of a dispatch or combine of few rows, as a mean of both and their backward passes."""
    x_ND = torch.randn(8, 8, device=device, requires_grad=True)
    gating = topk_gating(torch.randn(8, 2, device=device), 8)

    def both() -> None:
        rows = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, None)
        combine(rows, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, None).sum().backward()

    return seconds(both, device, 1) / 4


def _reading(device: torch.device) -> tuple[float, float]:
    """Time to find a sample, and rate of reading, from batches of small and of large samples in the page cache."""
    found = []
    with tempfile.TemporaryDirectory() as folder, h5py.File(Path(folder, "latents.h5"), "w") as file:
        for grid in (1, 16):
            z = file.create_dataset(f"z{grid}", data=np.zeros((8, 32, grid, grid, grid), dtype=np.float32))
            geometry = torch.zeros(32, grid, grid, grid)
            samples = LatentSamples([LatentTrajectory("none", "none", 0, z, geometry, geometry[0])], 2)
            picks = [(0, index) for index in range(4)]
            taken = seconds(lambda: samples.batch(picks).to(device, torch.float32), device, 1)  # noqa: B023
            found.append((4 * 4 * 4 * 32 * grid**3, taken))
    (few, short), (many, long) = found
    rate = (many - few) / max(long - short, 1e-9)
    return max(short - few / rate, 0.0) / 4, rate
