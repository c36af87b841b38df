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

    def exchange_counts(self, count_E: Tensor) -> Tensor:
        """How many rows each rank of the group sends to each expert here, [G, L], from one's own counts by expert."""
        count_GL = count_E.view(self.size, -1)
        if self.size == 1:
            return count_GL
        received_GL = torch.empty_like(count_GL)
        dist.all_to_all_single(received_GL, count_GL.contiguous(), group=self._ready_group())
        return received_GL

    def _ready_group(self) -> dist.ProcessGroup:
        if self.group is None:
            raise RuntimeError("the expert-parallel group is not set: wrap the model with training.engine first")
        return self.group


Splits = list[int] | None  # rows for each rank of the group; None: equal blocks


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, group: dist.ProcessGroup, send: Splits, receive: Splits, pending: list[dist.Work]
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        out = x.new_empty(x.shape if receive is None else (sum(receive), *x.shape[1:]))
        pending.append(dist.all_to_all_single(out, x, receive, send, group=group, async_op=True))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # What came goes back: the exchange with its splits swapped is its transpose.
        pending: list[dist.Work] = []
        grad = _AllToAll.apply(grad.contiguous(), ctx.group, ctx.receive, ctx.send, pending)
        pending[0].wait()
        return grad, None, None, None, None


class InFlight:
    """An exchange that has begun. Work that needs neither tensor may go on before `wait`."""

    def __init__(self, sent: Tensor, received: Tensor, work: dist.Work | None):
        self._sent, self._received, self._work = sent, received, work  # the sent rows must live until the end

    def wait(self) -> Tensor:
        """The rows received, in the order of the ranks that sent them."""
        if self._work is not None:
            self._work.wait()
        return self._received


def start_all_to_all(x: Tensor, ep: ExpertParallel, send: Splits = None, receive: Splits = None) -> InFlight:
    """Begin to send the g-th block of the first axis to rank g of the EP group; autograd can go through.

    Args:
        x: the blocks one after the other; every rank passes the same shape if the splits are None.
        send: rows of each block.
        receive: rows that come from each rank.
    """
    if ep.size == 1:
        return InFlight(x, x, None)
    pending: list[dist.Work] = []
    x = x.contiguous()
    return InFlight(x, _AllToAll.apply(x, ep._ready_group(), send, receive, pending), pending[0])


def all_to_all(x: Tensor, ep: ExpertParallel, send: Splits = None, receive: Splits = None) -> Tensor:
    """`start_all_to_all` and its end."""
    return start_all_to_all(x, ep, send, receive).wait()
