"""Derive the config of a tokenizer's training run, in the form that the trainer and the launcher need."""

from __future__ import annotations

from shodh_moe.base.errors import UserError
from shodh_moe.base.section import taken_by_tokenizer
from shodh_moe.config import Config, TrainingConfig
from shodh_moe.config.paths import tokenizer_seed
from shodh_moe.training.deepspeed_config import deepspeed_config


def tokenizer_run(config: Config, world: int) -> Config:
    """Make the config of the tokenizer's training on ``world`` ranks.

    Its training section is derived from the tokenizer section, and sections that do not concern the tokenizer have
    their defaults, so that two runs with the same tokenizer get the same config. Idempotent.

    Raises:
        UserError: the batch cannot be divided among the ranks, or the DeepSpeed section does not fit.
    """
    c = config.tokenizer
    if c.batch_size % world:
        raise UserError(
            f"tokenizer.batch_size {c.batch_size} cannot be divided among {world} ranks: make it a multiple of "
            f"{world}, or train the tokenizer on fewer ranks (parallel.processes, or another hostfile)"
        )
    training = TrainingConfig(
        steps=c.steps,
        batch_size=c.batch_size // world,
        learning_rate=c.learning_rate,
        min_learning_rate=0.02 * c.learning_rate,
        warmup_steps=max(c.steps // 20, 1),
        weight_decay=0.01,
        betas=[0.9, 0.999],
        precision=c.precision,
        checkpoint_every=c.checkpoint_every,
        validate_every=c.checkpoint_every,
        keep_last=1,
        log_every=c.log_every,
        **taken_by_tokenizer(config.training),
    )
    run = Config(
        name="tokenizer",
        seed=tokenizer_seed(config),
        data=config.data,
        tokenizer=c.model_copy(update={"seed": None}),
        training=training,
        parallel=config.parallel.model_copy(update={"ep_size": 1, "context_size": 1}),  # no experts, no slabs
        deepspeed=config.deepspeed,
    )
    deepspeed_config(run, world)
    return run
