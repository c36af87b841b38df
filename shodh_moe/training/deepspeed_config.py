"""DeepSpeed's settings for a run, which are also checked before any process starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any

from shodh_moe.base.divisors import nearest_divisor
from shodh_moe.base.errors import UserError
from shodh_moe.config import Config, RunConfig
from shodh_moe.parallel import Layout

BUCKET = 500_000_000  # DeepSpeed's default for reduce_bucket_size, in elements


def layout_of(config: Config, world_size: int) -> Layout:
    """Return the layout of the ranks; ``parallel.ep_size`` auto is the largest that is possible.

    Raises:
        UserError: context_size does not divide the world size, or ep_size the number of experts or the number of ranks
            with the same slab.
    """
    experts, ep, cp = config.model.moe.num_experts, config.parallel.ep_size, config.parallel.context_size
    if world_size % cp:
        raise UserError(
            f"parallel.context_size {cp} does not divide the world size {world_size}: set it to "
            f"{nearest_divisor(cp, world_size)}, or change parallel.processes"
        )
    same_slab = world_size // cp
    if ep == "auto":
        return Layout(world_size, math.gcd(same_slab, experts) if experts else 1, cp)
    if ep > 1 and not experts:
        raise UserError(
            f"parallel.ep_size {ep}: model.moe.num_experts is 0, so there are no experts to distribute: set it to auto"
        )
    if experts % ep:
        raise UserError(
            f"model.moe.num_experts {experts} is not divisible by parallel.ep_size {ep}; change one of them"
        )
    if same_slab % ep:
        what = f"the world size {world_size}" + (f" divided by parallel.context_size {cp}" if cp > 1 else "")
        raise UserError(
            f"parallel.ep_size {ep} does not divide {what}: set it to "
            f"{nearest_divisor(ep, math.gcd(same_slab, experts))}, or change parallel.processes"
        )
    return Layout(world_size, ep, cp)


def exchanges_samples(config: Config, ep_size: int) -> bool:
    """Whether ``parallel.exchange`` selects an exchange of samples; the config refuses what is impossible."""
    return ep_size > 1 and config.parallel.exchange != "token" and config.samples_have_paths


def fit_layout(config: Config, world_size: int) -> Config:
    """Return the config with the largest sizes up to the given ones that this world size allows.

    The context size stays a divisor of the given one, as it has to divide the latent grid.
    """
    ep, cp = config.parallel.ep_size, math.gcd(config.parallel.context_size, world_size)
    if ep != "auto":
        common = math.gcd(world_size // cp, config.model.moe.num_experts)
        ep = max(size for size in range(1, min(ep, common) + 1) if common % size == 0)
    parallel = config.parallel.model_copy(update={"ep_size": ep, "context_size": cp})
    return config.model_copy(update={"parallel": parallel})


def deepspeed_config(config: RunConfig, world_size: int, parameters: int | None = None) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a config; the ``deepspeed`` section is merged in last.

    Args:
        parameters: number of parameters that a rank holds. ZeRO allocates its buckets in full, two gigabytes by default
            in float32, so a smaller network gets a bucket of its own size. None: DeepSpeed's default.

    Raises:
        UserError: the section has a key that DeepSpeed does not know, that would have no effect here or break
            checkpoints, or that another section owns; the message names the key to use instead.
    """
    _check_keys(config.deepspeed)
    stage, zero = config.parallel.zero_stage, config.deepspeed.get("zero_optimization", {})
    if parameters is not None:
        zero = {"reduce_bucket_size": min(parameters, BUCKET), **zero}
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size,
        "train_batch_size": config.training.batch_size * config.training.accumulation * world_size,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": 0.0,  # `Engine.step` clips by the true global norm
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every step
        **config.deepspeed,
        "zero_optimization": {"stage": stage, "compute_grad_norm": False, **zero} if stage else {"stage": 0},
    }


_FLAGS = (
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "steps_per_print", "log_level"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer"),
)
_FLOPS = {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}
_COMET = {"enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name", "online", "mode"}
# The keys of DeepSpeed that have an effect here, each with the keys of its section; empty for a single value.
SETTINGS: dict[str, set[str]] = {
    **{key: set() for key in _FLAGS},
    "zero_optimization": {
        *("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "use_multi_rank_bucket_allreduce")
    },
    "flops_profiler": _FLOPS,
    "comms_logger": {"enabled", "prof_all", "prof_ops", "verbose", "debug"},
    "timers": {"throughput"},
    "tensorboard": {"enabled", "output_path", "job_name"},
    "csv_monitor": {"enabled", "output_path", "job_name"},
    "wandb": {"enabled", "group", "team", "project"},
    "comet": {*_COMET, "experiment_key"},
}
_PRECISION, _BATCH = "set training.precision", "set training.batch_size and training.accumulation"
_CHECKPOINTS, _EXPERTS = "set training.checkpoint_every and training.keep_last", "set parallel.ep_size"
_OFFLOAD = "state stays in the GPUs' memory; shard it with parallel.zero_stage"
_ONE_STEP = "gradients are averaged, and clipped by training.grad_clip"
# What to do instead of the other keys of DeepSpeed.
INSTEAD = {
    "optimizer": "set training.optimizer, training.learning_rate, training.betas and training.weight_decay",
    "scheduler": "set training.learning_rate, training.min_learning_rate and training.warmup_steps",
    "gradient_clipping": "set training.grad_clip",
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), _BATCH),
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "torch_autocast", "data_types", "amp"), _PRECISION),
    "activation_checkpointing": "set training.activation_checkpointing",
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _CHECKPOINTS),
    **dict.fromkeys(("expert_parallel", "use_data_before_expert_parallelism"), _EXPERTS),
    **dict.fromkeys(("aio", "zero_force_ds_cpu_optimizer"), _OFFLOAD),
    **dict.fromkeys(("gradient_allreduce_op", "managed_gradient_accumulation", "disable_allgather"), _ONE_STEP),
    "zero_optimization.stage": "set parallel.zero_stage",
}


def _check_keys(section: dict[str, Any]) -> None:
    for key, value in section.items():
        _check_key(key, SETTINGS)
        if not SETTINGS[key]:
            continue
        if not isinstance(value, dict):
            raise UserError(f"deepspeed.{key} must contain `key: value` settings, not {value!r}")
        for inner in value:
            _check_key(inner, SETTINGS[key], f"{key}.")


def _check_key(key: str, known: Collection[str], prefix: str = "") -> None:
    """Raise `UserError` with a remedy unless ``key`` is one of the ``known`` ones."""
    if key in known:
        return
    full = f"{prefix}{key}"
    if full in INSTEAD:
        raise UserError(f"deepspeed.{full} has no effect here: {INSTEAD[full]} instead")
    near = difflib.get_close_matches(str(key), [*known, *(() if prefix else INSTEAD)], n=1)
    remedy = f"the nearest is {near[0]!r}" if near else f"the supported ones are {', '.join(sorted(known))}"
    raise UserError(f"deepspeed.{full} is not a key of DeepSpeed that training supports: {remedy}")
