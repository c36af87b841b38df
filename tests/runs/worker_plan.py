"""One rank of test_plan: count all tensors while a real engine makes two steps. Rank 0 writes counts.json.

Arguments: a config, then one argument per engine with its overrides, separated by spaces.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shodh_moe.base.command import end_rank
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.runs.live_bytes import LiveBytes
from shodh_moe.tokenizer.latents import Batch
from shodh_moe.training.forward import forward
from shodh_moe.training.pretrain import latent_engine
from shodh_moe.training.process_group import init_distributed


def main() -> int:
    path, *layouts = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    init_distributed()
    dist.all_reduce = _released(dist.all_reduce)
    counts = [measure(load_config(path, layout.split())) for layout in layouts]
    if dist.get_rank() == 0:
        Path(path).with_name("counts.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _released(all_reduce: Any) -> Any:
    """Wrap ``all_reduce`` so that it waits until gloo's thread has released the tensor. NCCL has no such thread."""

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = tensor._use_count()
        work = all_reduce(tensor, *args, **kwargs)
        while work is None and tensor._use_count() > before:
            time.sleep(1e-3)
        return work

    return call


def measure(config: Config) -> dict[str, int]:
    """Measure the bytes alive between two steps, and the peak during two steps."""
    t, channels = config.training, config.tokenizer.latent_channels
    grid = [size // 8 for size in config.data.grid]
    with LiveBytes() as live:
        engine = latent_engine(config, channels, grid)
        live.peak = 0
        for _ in range(2 * t.accumulation):
            history = torch.randn(t.batch_size, config.model.history, channels, *grid, dtype=engine.dtype)
            geometry, target = torch.randn(2, t.batch_size, channels, *grid, dtype=engine.dtype)
            label_B = torch.zeros(t.batch_size, dtype=torch.int64)
            batch = Batch(history, geometry, target[:, None], label_B, label_B + 1)
            losses, _, _ = forward(engine, batch, config)
            engine.step(losses.loss, 1e-3)
            del history, geometry, target, label_B, batch, losses
        return {"between": live.now, "peak": live.peak}


if __name__ == "__main__":
    end_rank(main)
