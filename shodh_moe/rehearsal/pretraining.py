"""Rehearse pretraining: build the task as a rank does, make steps, write a record, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer
from shodh_moe.rehearsal.inputs import latent_samples
from shodh_moe.rehearsal.watch import Watch
from shodh_moe.training import pretrain
from shodh_moe.training.deepspeed_patches import group_name
from shodh_moe.training.engine import Engine
from shodh_moe.training.interval import Interval
from shodh_moe.training.task import Task
from shodh_moe.training.trainer import Loop, Start


class OnDevice(LatentTransformer):
    """A transformer that is built on the device, where its weights need no memory. A training moves it there."""

    def __init__(self, *args: Any, **kwargs: Any):
        with torch.device("cuda"):
            super().__init__(*args, **kwargs)


def rehearse_pretraining(config: Config, watch: Watch) -> None:
    """Run the trainer's own code in the phases build, first step, step, recorded step, record and validation."""
    # The k-means of the first start reads data, and runs on the CPU.
    moe = config.model.moe
    moe = moe.model_copy(update={"router": moe.router.model_copy(update={"start": "random"})})
    config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    samples = latent_samples(config)
    with watch.during("build"), patch.object(pretrain, "LatentTransformer", OnDevice):
        task = pretrain.LatentTask(config, samples, samples, Path(), {}, {})
    name_groups(watch, task.engine)
    rehearse_training(task, config, watch)


def rehearse_training(task: Task, config: Config, watch: Watch, prefix: str = "") -> None:
    """Make three steps of a task, of which the last has a record, and validate; ``prefix`` begins the phases' names."""
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 3})})
    start = Start(0, None, None, Interval())
    loop = Loop(task, config, start, None, None, None, [])  # type: ignore[arg-type]
    with watch.during(f"{prefix}first step"):
        loop.make_step(0)
    with watch.during(f"{prefix}step"):
        loop.make_step(1)
    with watch.during(f"{prefix}recorded step"):
        result = loop.make_step(2)
    with watch.during(f"{prefix}record"):
        loop.write_train_record(3, result)
    with watch.during(f"{prefix}validation"):
        task.validate()


def name_groups(watch: Watch, engine: Engine) -> None:
    """Tell the watch what the engine's process groups are for."""
    if engine.ep.group is not None:
        watch.groups[engine.ep.group.group_name] = "expert parallel"
        replicas = groups._get_expert_data_parallel_group(group_name(engine.layout))
        watch.groups[replicas.group_name] = "expert data parallel"
    if engine.cp.group is not None:
        watch.groups[engine.cp.group.group_name] = "context parallel"
    assert dist.group.WORLD is not None
    watch.groups[dist.group.WORLD.group_name] = "world"
