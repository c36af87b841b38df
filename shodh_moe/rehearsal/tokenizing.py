"""Rehearse the training of a tokenizer: build the task as a rank does, make steps, validate, measure the latents."""

from __future__ import annotations

from pathlib import Path

import torch

from shodh_moe.config import Config
from shodh_moe.rehearsal.inputs import snapshots
from shodh_moe.rehearsal.pretraining import rehearse_training
from shodh_moe.rehearsal.watch import Watch
from shodh_moe.tokenizer.tokenizer import Tokenizer
from shodh_moe.training.tokenizer_task import TokenizerTask, set_latent_statistics


def rehearse_tokenizer(config: Config, watch: Watch) -> None:
    """Run the training's own code, with phases that begin with ``tokenizer``.

    Args:
        config: from `tokenizer_run`.
    """
    samples = snapshots(config, max(config.tokenizer.batch_size // 2, 2))
    with watch.during("tokenizer build"):
        with torch.device("cuda"):
            tokenizer = Tokenizer(config.tokenizer, config.data.grid)
        tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = config.tokenizer.activation_checkpointing
        task = TokenizerTask(config, tokenizer, samples, samples, None, Path(), {})
    rehearse_training(task, config, watch, "tokenizer ")
    with watch.during("tokenizer statistics"):
        set_latent_statistics(tokenizer, samples, task.tokens, lambda: True)
