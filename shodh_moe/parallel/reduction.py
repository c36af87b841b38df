"""Sums over all ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks, without gradient (collective); a process that is alone gets a copy.

    Args:
        operation: another reduction than the sum.
    """
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values
