"""The networks of a mixture of experts: shared experts, and the routed experts that a rank holds.

Shapes: L local experts, T rows per expert, G ranks that send them, R rows of all experts, D model width, F hidden
width (2 F where gate and up are concatenated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shodh_moe.base.parameters import mark_all
from shodh_moe.config import MoEConfig
from shodh_moe.model.grouped import grouped_linear, has_grouped_kernel


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def shared_experts(dim: int, config: MoEConfig) -> nn.ModuleList:
    """Make the networks of one layer that every token passes through."""
    shared = nn.ModuleList(FeedForward(dim, config.expert_hidden) for _ in range(config.shared_experts))
    mark_all(shared, group="shared")
    return shared


def sum_outputs(experts: nn.ModuleList, x: Tensor) -> Tensor | None:
    """Sum of all the experts' outputs for ``x``; None if there are no experts."""
    total = None
    for expert in experts:
        total = expert(x) if total is None else total + expert(x)
    return total


def random_stream(*numbers: int) -> torch.Generator:
    """A random stream of its own for each sequence of numbers, such as a seed and an expert."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


class Experts(nn.Module):
    """The routed SwiGLU experts of one layer that this rank holds, as stacked weights.

    Each expert draws its initial weights from its own random stream (seed, layer, global index), so they do not depend
    on the rank that holds it.

    Args:
        dim: model width D.
        hidden: hidden width F.
        global_indices: numbers of the L local experts among all experts of the layer.
        seed, layer: select the random streams.
    """

    def __init__(self, dim: int, hidden: int, global_indices: Sequence[int], seed: int, layer: int):
        super().__init__()
        self.gate_up_LDF = nn.Parameter(torch.empty(len(global_indices), dim, 2 * hidden))
        self.down_LFD = nn.Parameter(torch.empty(len(global_indices), hidden, dim))
        mark_all(self, per_expert=True, sharded=True, group="expert")
        for local, expert in enumerate(global_indices):
            generator = random_stream(seed, layer, expert)
            for weight in (self.gate_up_LDF, self.down_LFD):
                bound = weight.shape[1] ** -0.5  # as in nn.Linear
                weight.data[local].uniform_(-bound, bound, generator=generator)

    def forward(self, x_LTD: Tensor, filled_LG: Tensor | None = None) -> Tensor:
        """Outputs [L, T, D], in autocast's dtype under autocast.

        Args:
            x_LTD: T rows for each expert, in blocks of T / G rows from each of G ranks.
            filled_LG: number of rows at the start of each block that hold a token. The others are zero, and a CPU
                skips them. None: every row may hold a token.
        """
        x_LTD, gate_up_LDF, down_LFD = to_autocast(x_LTD, self.gate_up_LDF, self.down_LFD)
        # On a GPU, reading the counts would wait for the device; a graph has no counts.
        if x_LTD.is_cuda or torch.compiler.is_exporting():
            gate, up = torch.bmm(x_LTD, gate_up_LDF).chunk(2, dim=-1)
            return torch.bmm(F.silu(gate) * up, down_LFD)
        local, rows, _ = x_LTD.shape
        filled = [[rows]] * local if filled_LG is None else filled_LG.tolist()
        spans = []
        for expert, filled_G in enumerate(filled):
            block = rows // len(filled_G)
            begins = range(expert * rows, (expert + 1) * rows, max(block, 1))
            spans += [Span(expert, begin, begin + count) for begin, count in zip(begins, filled_G, strict=False)]
        return _SwiGLU.apply(x_LTD.flatten(0, 1), gate_up_LDF, down_LFD, spans).view(x_LTD.shape)

    def grouped(self, x_RD: Tensor, count_L: Tensor) -> Tensor:
        """Outputs [R, D] for rows sorted by expert: the first ``count_L[0]`` belong to expert 0, and so on."""
        x_RD, gate_up_LDF, down_LFD = to_autocast(x_RD, self.gate_up_LDF, self.down_LFD)
        if has_grouped_kernel(x_RD, gate_up_LDF, down_LFD):
            gate, up = grouped_linear(x_RD, gate_up_LDF, count_L).chunk(2, dim=-1)
            return grouped_linear(F.silu(gate) * up, down_LFD, count_L)
        spans, begin = [], 0
        for expert, count in enumerate(count_L.tolist()):
            spans.append(Span(expert, begin, begin + count))
            begin += count
        return _SwiGLU.apply(x_RD, gate_up_LDF, down_LFD, spans)


class Span(NamedTuple):
    """Rows ``begin`` to ``end`` (exclusive) belong to a local expert."""

    expert: int
    begin: int
    end: int


def to_autocast(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors to autocast's dtype if it is on; float64 stays float64.

    Autocast does this by itself for torch's products, but not for grouped products and custom functions.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


class _SwiGLU(torch.autograd.Function):
    """Pass each row through the expert of its span; rows outside every span give zero.

    Experts run one after the other, so that the hidden rows between an expert's two products are still in the cache.
    Results are written in place, without copies (autograd's own backward pass would concatenate slices of every
    weight's gradient). The backward pass recomputes the product of gate and up instead of storing it.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_up_LDF: Tensor, down_LFD: Tensor, spans: list[Span]) -> Tensor:
        y_RD, hidden_RF = torch.empty_like(x_RD), x_RD.new_empty(x_RD.shape[0], gate_up_LDF.shape[2])
        for expert, begin, end in spans:
            hidden = hidden_RF[begin:end]
            torch.mm(x_RD[begin:end], gate_up_LDF[expert], out=hidden)
            gate, up = hidden.chunk(2, dim=1)
            torch.mm(F.silu(gate).mul_(up), down_LFD[expert], out=y_RD[begin:end])
        _zero_between(spans, y_RD)
        ctx.save_for_backward(x_RD, gate_up_LDF, down_LFD, hidden_RF)
        ctx.spans = spans
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_up_LDF, down_LFD, hidden_RF = ctx.saved_tensors
        dx_RD, dgate_up_LDF, ddown_LFD = (torch.empty_like(t) for t in (x_RD, gate_up_LDF, down_LFD))
        longest = max((end - begin for _, begin, end in ctx.spans), default=0)
        dhidden_TF = hidden_RF.new_empty(longest, hidden_RF.shape[1])
        seen: set[int] = set()
        for expert, begin, end in ctx.spans:
            x, dy, dhidden = x_RD[begin:end], dy_RD[begin:end], dhidden_TF[: end - begin]
            gate, up = hidden_RF[begin:end].chunk(2, dim=1)
            dgate, dup = dhidden.chunk(2, dim=1)
            activation = F.silu(gate)
            dproduct = torch.mm(dy, down_LFD[expert].t())
            torch.mul(dproduct, activation, out=dup)
            product = activation.mul_(up)
            torch.ops.aten.silu_backward.grad_input(dproduct.mul_(up), gate, grad_input=dgate)
            add = int(expert in seen)  # the first span of an expert overwrites uninitialised memory
            seen.add(expert)
            ddown_LFD[expert].addmm_(product.t(), dy, beta=add)
            dgate_up_LDF[expert].addmm_(x.t(), dhidden, beta=add)
            torch.mm(dhidden, gate_up_LDF[expert].t(), out=dx_RD[begin:end])
        for expert in set(range(len(down_LFD))) - seen:
            ddown_LFD[expert].zero_()
            dgate_up_LDF[expert].zero_()
        _zero_between(ctx.spans, dx_RD)
        return dx_RD, dgate_up_LDF, ddown_LFD, None


def _zero_between(spans: list[Span], rows_RD: Tensor) -> None:
    """Set the rows outside all spans to zero."""
    done = 0
    for _, begin, end in spans:
        rows_RD[done:begin].zero_()
        done = end
    rows_RD[done:].zero_()
