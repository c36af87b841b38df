"""The expert-parallel (EP) group of a rank, and the all-to-all inside it that autograd can go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class ExpertParallel:
    """Which share of the experts this rank holds. ``group`` is set once the process groups exist."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def local_experts(self, num_experts: int) -> range:
        """Global indices of this rank's experts: consecutive blocks, rank by rank."""
        local = num_experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)

    def max_over_group(self, value: int) -> int:
        """The largest ``value`` of any rank of the group."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        if dist.get_backend(self.group) == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Equal blocks swap places, so the exchange is its own transpose.
        return _AllToAll.apply(grad, ctx.group), None


def all_to_all(x_G: Tensor, ep: ExpertParallel) -> Tensor:
    """Block g of the first axis goes to rank g of the EP group; block r of the result came from rank r.

    Every rank passes the same shape [G, ...]. With one rank the tensor comes back as it is.
    """
    if ep.size == 1:
        return x_G
    if ep.group is None:
        raise RuntimeError("the expert-parallel group is not set: wrap the model with training.engine first")
    return _AllToAll.apply(x_G, ep.group)
