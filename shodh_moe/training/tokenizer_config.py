"""The run that trains a config's tokenizer, as the trainer and the launcher want one."""

from __future__ import annotations

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config, TrainingConfig
from shodh_moe.config.paths import tokenizer_seed
from shodh_moe.training.deepspeed_config import deepspeed_config

# What the tokenizer's training takes from the training section: nothing that changes what is learned.
SHARED = ("optimizer", "on_nonfinite", "stall_seconds")


def tokenizer_run(config: Config, world: int) -> Config:
    """The config of the tokenizer's training on ``world`` ranks.

    Its training section follows from the tokenizer section, and what is not the tokenizer's is as by default: two runs
    with the same tokenizer have the same. Applied to its own result it changes nothing.

    Raises:
        UserError: the batch cannot be shared out, or the DeepSpeed section does not fit.
    """
    c = config.tokenizer
    if c.batch_size % world:
        raise UserError(
            f"tokenizer.batch_size {c.batch_size} cannot be shared out over {world} ranks: make it a multiple of "
            f"{world}, or train the tokenizer on fewer (parallel.processes, or a hostfile of its own)"
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
        **{key: getattr(config.training, key) for key in SHARED},
    )
    run = Config(
        name="tokenizer",
        seed=tokenizer_seed(config),
        data=config.data,
        tokenizer=c.model_copy(update={"seed": None}),
        training=training,
        parallel=config.parallel.model_copy(update={"ep_size": 1}),  # it has no experts
        deepspeed=config.deepspeed,
    )
    deepspeed_config(run, world)
    return run
