"""The expert-parallel (EP) group of a rank, and the all-to-all inside it that autograd can go through.

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

Splits = list[int] | None  # rows for each rank of the group; None: equal blocks
Direction = Literal["dispatch", "combine"]  # of the forward pass; its backward pass counts with it
Mark = float | torch.cuda.Event


@dataclass
class Exchange:
    """One all-to-all that was recorded. ``marks``: its start, the start of the wait for it, the end of that wait."""

    layer: int
    direction: Direction
    sent_bytes: int  # to other ranks
    marks: list[Mark]

    def times_ms(self) -> tuple[float, float]:
        """From start to the end of the wait, and the wait alone. On a GPU this waits for the exchange to be over."""
        start, waiting, end = self.marks
        return _elapsed_ms(start, end), _elapsed_ms(waiting, end)


@dataclass
class ExpertParallel:
    """Which share of the experts this rank holds. ``group`` is set once the process groups exist.

    ``exchanges``: set it to an empty list to have every all-to-all recorded there, to None (nothing is timed or
    counted) to end that.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    exchanges: list[Exchange] | None = field(default=None, repr=False)
    _agreed: set[tuple[int, int]] = field(default_factory=set, repr=False, compare=False)

    def local_experts(self, num_experts: int) -> range:
        """Global indices of this rank's experts: consecutive blocks, rank by rank."""
        local = num_experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)

    def exchange_counts(self, count_E: Tensor, layer: int = 0) -> Tensor:
        """How many rows each rank of the group sends to each expert here, [G, L], from one's own counts by expert."""
        count_GL = count_E.view(self.size, -1)
        if self.size == 1:
            return count_GL
        return _Running(count_GL.contiguous(), _Plan(self, None, None, layer, "dispatch")).wait()

    def check_same_tokens(self, tokens: int, capacity: int, device: torch.device) -> None:
        """Raise on every rank of the group unless all have as many tokens, and slots per expert, as this one.

        Blocks of an all-to-all with equal splits would not fit otherwise. The ranks compare when they meet two
        numbers they have not compared yet, so a change must come on all ranks in the same call to be seen.

        Raises:
            UserError: names the ranks and their numbers, alike on all ranks.
        """
        if self.size == 1 or (tokens, capacity) in self._agreed:
            return
        group = self._ready_group()
        mine = torch.tensor([tokens, capacity], device=device)
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
    """What goes where in one all-to-all."""

    ep: ExpertParallel
    send: Splits
    receive: Splits
    layer: int
    direction: Direction

    def sent_bytes(self, x: Tensor) -> int:
        """Bytes of ``x`` that leave this rank."""
        rows = x.shape[0] if self.send is None else sum(self.send)
        staying = rows // self.ep.size if self.send is None else self.send[self.ep.rank]
        return (rows - staying) * x.shape[1:].numel() * x.itemsize


class _Running:
    """An all-to-all in flight."""

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
        self._note()
        self._work.wait()
        self._note()
        return self.received

    def _note(self) -> None:
        if self._exchange is not None:
            self._exchange.marks.append(_mark(self.received))


def _mark(x: Tensor) -> Mark:
    """Now, in the order of the work on the device of ``x``: on a GPU an event, so that nobody waits for it."""
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
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, running: list[_Running]) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        running.append(_Running(x, plan))
        return running[0].received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # What came goes back: the exchange with its splits swapped is its transpose.
        plan = ctx.plan._replace(send=ctx.plan.receive, receive=ctx.plan.send)
        running: list[_Running] = []
        grad = _AllToAll.apply(grad.contiguous(), plan, running)
        running[0].wait()
        return grad, None, None


class InFlight:
    """An exchange that has begun. Work that needs neither tensor may go on before `wait`."""

    def __init__(self, sent: Tensor, received: Tensor, running: _Running | None):
        self._sent, self._received, self._running = sent, received, running  # the sent rows must live until the end

    def wait(self) -> Tensor:
        """The rows received, in the order of the ranks that sent them."""
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
    """Begin to send the g-th block of the first axis to rank g of the EP group; autograd can go through.

    Args:
        x: the blocks one after the other; every rank passes the same shape if the splits are None.
        send: rows of each block.
        receive: rows that come from each rank.
        layer, direction: under what to record it, see `ExpertParallel.exchanges`.
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
    """`start_all_to_all` and its end."""
    return start_all_to_all(x, ep, send, receive, layer, direction).wait()
