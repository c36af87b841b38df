"""The expert-parallel (EP) group of a rank, and a differentiable all-to-all within it.

Shapes: G ranks in the group, E experts, L local experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.tensors import sent_numbers

Splits = list[int] | None  # number of rows for each rank of the group; None: equal blocks
# What an exchange does in the forward pass; the backward pass is counted under the same name. `samples` has none.
Direction = Literal["dispatch", "combine", "samples"]
Mark = float | torch.cuda.Event


@dataclass
class Exchange:
    """Record of one all-to-all.

    Attributes:
        layer: number of the MoE layer.
        direction: what the exchange does in the forward pass.
        sent_bytes: number of bytes sent to other ranks.
        marks: times of its start, of the start of the wait for it, and of the end of that wait.
    """

    layer: int
    direction: Direction
    sent_bytes: int
    marks: list[Mark]

    def times_ms(self) -> tuple[float, float]:
        """Return the duration of the exchange and of the wait alone, in milliseconds.

        On a GPU, this blocks until the exchange has finished.
        """
        start, waiting, end = self.marks
        return _elapsed_ms(start, end), _elapsed_ms(waiting, end)


@dataclass
class ExpertParallel:
    """The share of the experts that this rank holds.

    Attributes:
        size: number of ranks that share the experts.
        rank: this rank's number among them.
        group: their process group; None until process groups exist.
        placement: the numbers of all experts in the order of the ranks that hold them, ascending within a rank; None:
            in the order of their numbers. All layers have the same one.
        exchanges: list to which every all-to-all appends its record; None: nothing is recorded.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    placement: list[int] | None = None
    exchanges: list[Exchange] | None = field(default=None, repr=False)
    _agreed: set[tuple[int, int]] = field(default_factory=set, repr=False, compare=False)

    def local_experts(self, num_experts: int) -> list[int]:
        """Global indices of this rank's experts, ascending."""
        local = num_experts // self.size
        return list(self.placement or range(num_experts))[self.rank * local :][:local]

    def holders(self, num_experts: int, device: torch.device) -> Tensor:
        """The rank that holds each expert, int64 [E]."""
        order_E = sent_numbers(list(self.placement or range(num_experts)), device)
        rank_E = torch.empty_like(order_E)
        rank_E[order_E] = torch.arange(num_experts, device=device) // (num_experts // self.size)
        return rank_E

    def exchange_counts(self, count_E: Tensor, layer: int = 0) -> Tensor:
        """Exchange the ranks' counts of rows per expert.

        Args:
            count_E: number of rows that this rank sends to each expert, in the order of ``placement``, int64.
            layer: number of the layer, for the record.

        Returns:
            Number of rows that each rank of the group sends to each of this rank's experts, int64 [G, L].
        """
        count_GL = count_E.view(self.size, -1)
        if self.size == 1:
            return count_GL
        return _Running(count_GL.contiguous(), _Plan(self, None, None, layer, "dispatch")).wait()

    def check_same_tokens(self, tokens: int, capacity: int, device: torch.device) -> None:
        """Check that all ranks of the group have the same number of tokens and of slots per expert.

        An all-to-all with equal splits needs equal blocks. Ranks communicate only for pairs of numbers that are new to
        them, so a change is noticed only if it happens on all ranks in the same call.

        Args:
            tokens: number of tokens of this rank.
            capacity: number of slots per expert.
            device: where to put the numbers for the comparison, a device that the group can use.

        Raises:
            UserError: the ranks differ; raised on all of them, and names the ranks and their numbers.
        """
        if self.size == 1 or (tokens, capacity) in self._agreed:
            return
        group = self._ready_group()
        mine = sent_numbers([tokens, capacity], device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=group)
        ranks_with: dict[tuple[int, ...], list[int]] = {}
        for rank, pair in zip(dist.get_process_group_ranks(group), torch.stack(everyone).tolist(), strict=True):
            ranks_with.setdefault(tuple(pair), []).append(rank)
        if len(ranks_with) > 1:
            found = "; ".join(
                f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {n} tokens, {k} slots per expert"
                for (n, k), ranks in ranks_with.items()
            )
            raise UserError(
                f"ranks that share experts have different batches ({found}): give every rank samples of the same "
                "number and size, and the same model.moe settings, or set model.moe.dropless=true"
            )
        self._agreed.add((tokens, capacity))

    def _ready_group(self) -> dist.ProcessGroup:
        if self.group is None:
            raise RuntimeError("the expert-parallel group is not set: wrap the model with training.engine first")
        return self.group


class _Plan(NamedTuple):
    """Group and splits of one all-to-all, and the layer and direction of its record."""

    ep: ExpertParallel
    send: Splits
    receive: Splits
    layer: int
    direction: Direction

    def sent_bytes(self, x: Tensor) -> int:
        """Number of bytes of ``x`` that go to other ranks."""
        rows = x.shape[0] if self.send is None else sum(self.send)
        staying = rows // self.ep.size if self.send is None else self.send[self.ep.rank]
        return (rows - staying) * x.shape[1:].numel() * x.itemsize


class _Running:
    """An all-to-all that has been started, and its record."""

    def __init__(self, x: Tensor, plan: _Plan):
        ep, self._exchange = plan.ep, None
        if ep.exchanges is not None:
            self._exchange = Exchange(plan.layer, plan.direction, plan.sent_bytes(x), [_mark(x)])
            ep.exchanges.append(self._exchange)
        self.received = x.new_empty(x.shape if plan.receive is None else (sum(plan.receive), *x.shape[1:]))
        self._work = dist.all_to_all_single(
            self.received, x, plan.receive, plan.send, group=ep._ready_group(), async_op=True
        )

    def wait(self) -> Tensor:
        self._record_time()
        self._work.wait()
        self._record_time()
        return self.received

    def _record_time(self) -> None:
        if self._exchange is not None:
            self._exchange.marks.append(_mark(self.received))


def _mark(x: Tensor) -> Mark:
    """Return the current time on the device of ``x``: on a GPU, an event in its stream, without blocking."""
    if not x.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(x.device))
    return event


def _elapsed_ms(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return (end - start) * 1e3  # type: ignore[operator]
    end.synchronize()
    return start.elapsed_time(end)


class _AllToAll(torch.autograd.Function):
    """Start an all-to-all, append it to ``running`` and return the tensor that it fills; backward waits for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, running: list[_Running]) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        running.append(_Running(x, plan))
        return running[0].received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The transpose of an exchange is the exchange with swapped splits.
        plan = ctx.plan._replace(send=ctx.plan.receive, receive=ctx.plan.send)
        running: list[_Running] = []
        grad = _AllToAll.apply(grad.contiguous(), plan, running)
        running[0].wait()
        return grad, None, None


class InFlight:
    """A started exchange. Before `wait`, the caller can do work that needs neither its input nor its result."""

    def __init__(self, sent: Tensor, received: Tensor, running: _Running | None):
        self._sent = sent  # must stay alive until the exchange ends
        self._received, self._running = received, running

    def wait(self) -> Tensor:
        """Return the rows received, in the order of the ranks that sent them."""
        if self._running is not None:
            self._running.wait()
        return self._received


def start_all_to_all(
    x: Tensor,
    ep: ExpertParallel,
    send: Splits = None,
    receive: Splits = None,
    layer: int = 0,
    direction: Direction = "dispatch",
) -> InFlight:
    """Start sending the g-th block of the first axis to rank g of the EP group; differentiable.

    Args:
        x: the blocks, concatenated along axis 0; every rank passes the same shape if the splits are None.
        send: number of rows in each block; None: equal blocks.
        receive: number of rows that each rank sends to this one; None: equal blocks.
        layer, direction: recorded with the exchange, see `ExpertParallel.exchanges`.
    """
    if ep.size == 1:
        return InFlight(x, x, None)
    running: list[_Running] = []
    x = x.contiguous()
    received = _AllToAll.apply(x, _Plan(ep, send, receive, layer, direction), running)
    return InFlight(x, received, running[0])


def all_to_all(
    x: Tensor,
    ep: ExpertParallel,
    send: Splits = None,
    receive: Splits = None,
    layer: int = 0,
    direction: Direction = "combine",
) -> Tensor:
    """Call `start_all_to_all` and wait for the result."""
    return start_all_to_all(x, ep, send, receive, layer, direction).wait()
