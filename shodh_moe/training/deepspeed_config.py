"""DeepSpeed's settings for a run, which are also checked before any process starts."""

from __future__ import annotations

import math
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config, RunConfig


def expert_parallel_size(config: Config, world_size: int) -> int:
    """Return ``parallel.ep_size``; ``auto`` is the greatest common divisor of the world size and number of experts.

    Raises:
        UserError: ep_size does not divide the world size or the number of experts.
    """
    experts, ep = config.model.moe.num_experts, config.parallel.ep_size
    if ep == "auto":
        return math.gcd(world_size, experts) if experts else 1
    if ep > 1 and not experts:
        raise UserError(
            f"parallel.ep_size {ep}: model.moe.num_experts is 0, so there are no experts to distribute: set it to auto"
        )
    if experts % ep:
        raise UserError(
            f"model.moe.num_experts {experts} is not divisible by parallel.ep_size {ep}; change one of them"
        )
    if world_size % ep:
        raise UserError(
            f"parallel.ep_size {ep} does not divide the world size {world_size}; change it or parallel.processes"
        )
    return ep


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a config; the ``deepspeed`` section is merged in last.

    Raises:
        UserError: the section asks for something that checkpoints cannot hold, or sets a key that another section
            owns.
    """
    owned = {"train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping"}
    if clash := sorted(owned & config.deepspeed.keys()):
        raise UserError(f"deepspeed.{clash[0]} is set from the training section: change it there")
    for key in ("fp16", "bf16", "torch_autocast", "data_types"):
        if key in config.deepspeed:
            raise UserError(f"deepspeed.{key}: set training.precision instead")
    zero = _section(config, "zero_optimization")
    if refused := sorted(zero.keys() - _ZERO_SETTINGS):
        instead = (
            "set parallel.zero_stage instead" if refused[0] == "stage" else "checkpoints and clipping do not support it"
        )
        raise UserError(f"deepspeed.zero_optimization.{refused[0]}: {instead}")
    stage = config.parallel.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size,
        "train_batch_size": config.training.batch_size * config.training.accumulation * world_size,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": 0.0,  # `Engine.step` clips by the true global norm
        "steps_per_print": 10**9,
        **config.deepspeed,
        "zero_optimization": {"stage": stage, "compute_grad_norm": False, **zero} if stage else {"stage": 0},
    }


_ZERO_SETTINGS = {"reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "use_multi_rank_bucket_allreduce"}


def _section(config: RunConfig, key: str) -> dict[str, Any]:
    section = config.deepspeed.get(key, {})
    if not isinstance(section, dict):
        raise UserError(f"deepspeed.{key} must contain `key: value` settings, not {section!r}")
    return section
