"""Sums over ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(
    values: Tensor, operation: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Reduce a tensor over ranks, without gradient (collective); a process that is alone gets a copy.

    Args:
        operation: another reduction than the sum.
        group: the ranks; None: all.
    """
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values, operation, group=group)
    return values
