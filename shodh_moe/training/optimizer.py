"""AdamW from PyTorch, DeepSpeed or NVIDIA's apex.

All three compute the same update, so a run may switch between them at a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh_moe.base.environment import has_apex
from shodh_moe.base.errors import UserError
from shodh_moe.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # all three use these names


def resolve_optimizer(config: TrainingConfig) -> str:
    """Return the library whose AdamW ``training.optimizer`` selects: torch, deepspeed or apex.

    Raises:
        UserError: it is not installed, or does not support ``training.precision``.
    """
    # ``auto`` is PyTorch's fused kernel on every device. Like apex's and DeepSpeed's, it reads each tensor only once,
    # but it needs no compiler at the first start and no loop over parameters (docs/benchmarks.md has the times).
    choice = "torch" if config.optimizer == "auto" else config.optimizer
    if choice != "torch" and config.precision == "float64":
        raise UserError(f"training.optimizer {choice} has no float64 kernel: set it to torch or auto")
    if choice == "apex" and not (has_apex() and torch.cuda.is_available()):
        raise UserError(
            "training.optimizer apex: NVIDIA's apex is not installed (the package registry's `apex` is another "
            "project's); build it from source as the Dockerfile does, or set training.optimizer to auto"
        )
    return choice


def make_optimizer(choice: str, groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Make an AdamW over parameter groups; `make_state` creates its state.

    Args:
        choice: the result of `resolve_optimizer`.

    Raises:
        UserError: DeepSpeed cannot compile its kernel here.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.betas[0], config.betas[1])}
    if choice == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if choice == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.adam import FusedAdam as DeepSpeedFusedAdam

    try:
        if torch.cuda.is_available():
            return DeepSpeedFusedAdam(groups, adam_w_mode=True, **settings)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except Exception as error:  # a missing compiler causes many kinds of errors
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"training.optimizer deepspeed: its kernel cannot be compiled here ({reason}); set it to auto"
        ) from error


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that the first step would create, so that it can be saved and loaded at any time."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter.detach(), memory_format=torch.preserve_format)
    set_updates(optimizer, 0)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of updates made so far."""
    group = optimizer.param_groups[0]
    return int(group.get("step", 0) if _is_apex(optimizer) else optimizer.state[group["params"][0]]["step"])


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Set the number that `updates` returns, wherever the optimizer keeps it."""
    for group in optimizer.param_groups:
        if _is_apex(optimizer):
            group["step"] = count
            continue
        for parameter in group["params"]:
            step: int | Tensor = count
            if isinstance(optimizer, torch.optim.AdamW):
                step = torch.full((), float(count), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter]["step"] = step


def _is_apex(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("apex")
