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
from shodh_moe.rehearsal.inputs import rehearsal_samples
from shodh_moe.rehearsal.watch import Watch
from shodh_moe.training import pretrain
from shodh_moe.training.engine import Engine
from shodh_moe.training.interval import Interval
from shodh_moe.training.pretrain import _LatentTask
from shodh_moe.training.trainer import _Loop, _Start


class _OnDevice(LatentTransformer):
    """A transformer that is built on the device, where its weights need no memory. A training moves it there."""

    def __init__(self, *args: Any, **kwargs: Any):
        with torch.device("cuda"):
            super().__init__(*args, **kwargs)


def rehearse_pretraining(config: Config, watch: Watch) -> None:
    """Run the trainer's own code on fake CUDA tensors, in the phases build, first step, step, record and validation."""
    random = config.model.moe.router.model_copy(update={"start": "random"})
    moe = config.model.moe.model_copy(update={"router": random})
    training = config.training.model_copy(update={"steps": 3})
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"moe": moe}), "training": training}
    )
    samples = rehearsal_samples(config)
    with watch:
        with watch.during("build"), patch.object(pretrain, "LatentTransformer", _OnDevice):
            task = _LatentTask(config, samples, samples, Path("."), {}, {})
        name_groups(watch, task.engine)
        start = _Start(0, None, None, Interval())
        loop = _Loop(task, config, start, None, None, None, [])  # type: ignore[arg-type]
        with watch.during("first step"):
            loop._step(0)
        start.interval.clear()
        with watch.during("step"):
            loop._step(1)
        with watch.during("step with record"):
            result = loop._step(2)
        with watch.during("record"):
            loop._write_train_record(3, result)
        with watch.during("validation"):
            task.validate()


def name_groups(watch: Watch, engine: Engine) -> None:
    """Tell the watch what the engine's process groups are for."""
    if engine.ep.group is not None:
        watch.groups[engine.ep.group.group_name] = "expert parallel"
        replicas = groups._get_expert_data_parallel_group(f"ep_size_{engine.ep.size}")
        watch.groups[replicas.group_name] = "expert data parallel"
    watch.groups[dist.group.WORLD.group_name] = "world"
