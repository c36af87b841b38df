"""One rank of test_tokenizer_task: train several tokenizers, one after the other, in one process group.

Arguments: a folder with tiny.yaml and the datasets ``theirs`` and ``altered``, which share the training split; then the
names of the trainings, which `main` lists.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shodh_moe.base.command import end_rank
from shodh_moe.base.errors import EXIT_REQUEUE, UserError
from shodh_moe.config.load import load_config
from shodh_moe.training import tokenizer_task as training
from shodh_moe.training import trainer
from shodh_moe.training.process_group import init_distributed
from shodh_moe.training.tokenizer_config import tokenizer_run

folder, *names = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
folder = Path(folder)
init_distributed()
trainer.leave_process_group = lambda failed: None
end_of_step = training.TokenizerTask.end
set_latent_statistics = training.set_latent_statistics


class Interrupted(Exception):
    pass


def train(name: str, *overrides: str, data: str = "theirs") -> None:
    """Train in the folder ``name``, from the initial state that the training ``whole`` has computed."""
    start = folder / "whole/start.safetensors"
    if dist.get_rank() == 0 and name != "alone" and start.exists() and not (folder / name).exists():
        (folder / name).mkdir()
        shutil.copy(start, folder / name)
    config = tokenizer_run(load_config(folder / "tiny.yaml", list(overrides)), dist.get_world_size())
    training.train_tokenizer(config, folder / data, folder / name)


def interrupt(task: Any, step: int, applied: bool) -> None:
    if step == 3:
        raise Interrupted
    end_of_step(task, step, applied)


def terminate_first(*arguments: Any) -> bool:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return set_latent_statistics(*arguments)


def main() -> int:
    for name in names:
        if name in ("whole", "alone"):
            train(name)
        if name == "broken":  # interrupted after the checkpoint of step 2; resumed with other flows in the other splits
            training.TokenizerTask.end = interrupt  # type: ignore[method-assign]
            with pytest.raises(Interrupted):
                train(name)
            training.TokenizerTask.end = end_of_step  # type: ignore[method-assign]
            assert not (folder / name / "tokenizer.json").exists()
            train(name, data="altered")
        if name == "asked":  # rank 1 gets SIGTERM while the latent statistics are computed, after the last step
            training.set_latent_statistics = terminate_first
            with pytest.raises(SystemExit, match=str(EXIT_REQUEUE)):
                train(name)
            training.set_latent_statistics = set_latent_statistics
            assert not (folder / name / "tokenizer.json").exists()
            train(name)
        if name == "direct":
            settings = (
                "decoder=direct",
                "walls=none",
                "divergence_weight=0.5",
                "operator=staggered",
                "precision=bfloat16",
            )
            settings = (*settings, "activation_checkpointing=true")
            train(name, "parallel.zero_stage=1", *(f"tokenizer.{setting}" for setting in settings))
        if name == "high":
            with pytest.raises((UserError, SystemExit)) as error:
                train(name, "tokenizer.learning_rate=1e30")
            if dist.get_rank() == 0:
                (folder / name / "error.txt").write_text(str(error.value))
    dist.barrier()
    return 0


end_rank(main)
