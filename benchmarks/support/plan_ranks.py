"""One rank of benchmarks/plan_accuracy.py: a few training steps in each of several layouts.

Argument: a JSON file with ``config`` (a tree), ``layouts`` (lists of overrides), ``steps``, ``latents`` (an HDF5 file)
and ``results``, the file to which rank 0 appends a line with the step times of each layout.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.distributed as dist
import yaml

from shodh_moe.base.command import end_rank
from shodh_moe.config import Config
from shodh_moe.config.load import load_config

WARM_UP = 2
SNAPSHOTS = 12


def write_latents(path: Path, config: Config) -> None:
    """Write random latents in a config's shapes, one trajectory of each of its domains, in the layout of real ones."""
    random = np.random.default_rng(0)
    shape = (config.tokenizer.latent_channels, *(size // 8 for size in config.data.grid))
    with h5py.File(path, "w") as file:
        for name, _ in config.data.domains.items():
            file[name] = random.standard_normal((SNAPSHOTS, *shape), dtype=np.float32)


def _samples(file: h5py.File, config: Config) -> Any:
    from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory

    trajectories = []
    for name in sorted(file):
        geometry = torch.zeros(file[name].shape[1:])
        trajectories.append(LatentTrajectory(name, "random", 0, file[name], geometry, geometry[0]))
    return LatentSamples(trajectories, config.model.history, None, config.model.strides, config.training.unroll)


def step_times(config: Config, latents: Path, steps: int) -> list[float]:
    """Seconds of this many steps of the trainer's own loop, after `WARM_UP` others."""
    from shodh_moe.training.interval import Interval
    from shodh_moe.training.pretrain import LatentTask
    from shodh_moe.training.trainer import Loop, Start

    with h5py.File(latents, "r") as file:
        samples = _samples(file, config)
        task = LatentTask(config, samples, samples, Path(), {}, {})  # type: ignore[arg-type]
        start = Start(0, None, None, Interval())
        loop = Loop(task, config, start, None, None, None, [])  # type: ignore[arg-type]
        for step in range(WARM_UP + steps):
            dist.barrier()
            loop.make_step(step)
        return start.interval.times[WARM_UP:]


def main() -> int:
    from shodh_moe.base.memory import keep_freed_memory
    from shodh_moe.training.process_group import init_distributed

    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a training does
    task = json.loads(Path(sys.argv[1]).read_text())
    path = Path(sys.argv[1]).with_name(f"config.{os.environ['RANK']}.yaml")
    path.write_text(yaml.safe_dump(task["config"]))
    init_distributed()
    for layout in task["layouts"]:
        times = step_times(load_config(path, layout.split()), Path(task["latents"]), task["steps"])
        gc.collect()
        if dist.get_rank() == 0:
            with open(task["results"], "a") as file:
                file.write(json.dumps({"layout": layout, "times": times}) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    end_rank(main)
