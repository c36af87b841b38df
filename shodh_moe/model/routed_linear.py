"""Linear map with a part that each expert's path has for itself (DESIGN 3.4).

Shapes: N tokens, I inputs, O outputs, E experts, K slots per expert, Q rank of the routed part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.parameters import mark
from shodh_moe.model.experts import random_stream, to_autocast
from shodh_moe.model.grouped import grouped_linear, has_grouped_kernel
from shodh_moe.model.plan import Plan


class RoutedLinear(nn.Module):
    """y = W x + b + p_e W_e x, where e is the expert of the token's path and p_e its gate.

    Every rank holds the W_e of all experts, so no token travels. A token that its expert dropped keeps W x + b. The
    initial W_e depend on e, but not on the number of experts.

    Args:
        inputs, outputs: I and O.
        experts: E; 0 makes a plain linear map.
        bias: whether there is a b.
        rank: Q, for W_e = B_e A_e with A_e of shape [Q, I]; None for full matrices. B_e starts at zero.
        shared: whether there is a W.
        zero: start at zero: W, b and W_e.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        experts: int = 0,
        bias: bool = True,
        rank: int | None = None,
        shared: bool = True,
        zero: bool = False,
    ):
        super().__init__()
        self.in_features, self.experts, self.rank = inputs, experts, rank
        bound = 0.0 if zero else inputs**-0.5  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound)) if shared else None
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None
        if not experts:
            return
        if rank is None:
            self.routed_EIO = nn.Parameter(_drawn(experts, inputs, outputs, bound))
            mark(self.routed_EIO, group="path", per_expert=True)
        else:
            self.narrow_EIQ = nn.Parameter(_drawn(experts, inputs, rank, bound))
            self.widen_EQO = nn.Parameter(torch.zeros(experts, rank, outputs))
            mark(self.narrow_EIQ, group="path", per_expert=True)
            mark(self.widen_EQO, group="path", per_expert=True)

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        """Map the last axis of ``x``; the other axes hold the N tokens of ``plan`` in order."""
        weight = self.weight  # once: a low-rank addition computes it at each access
        y = None if weight is None else F.linear(x, weight, self.bias)
        if not self.experts:
            assert y is not None
            return y
        assert plan is not None
        (x_NI,) = to_autocast(x.reshape(-1, x.shape[-1]))
        rows = plan.dispatch(x_NI)
        if self.rank is None:
            rows = _product(rows, self.routed_EIO, plan)
        else:
            rows = _product(_product(rows, self.narrow_EIQ, plan), self.widen_EQO, plan)
        y_NO = plan.combine(rows, None if y is None else y.reshape(-1, y.shape[-1])).view(*x.shape[:-1], -1)
        return y_NO if y is not None or self.bias is None else y_NO + self.bias.to(y_NO.dtype)


def _drawn(experts: int, inputs: int, outputs: int, bound: float) -> Tensor:
    """Initial weights [E, I, O], drawn for each expert from a random stream of its own."""
    seed = int(torch.randint(2**31, (), device="cpu"))  # the weights may be on the meta device
    weight_EIO = torch.empty(experts, inputs, outputs)
    for expert in range(experts):
        weight_EIO[expert].uniform_(-bound, bound, generator=random_stream(seed, expert))
    return weight_EIO


def _product(rows: Tensor, weight_EIO: Tensor, plan: Plan) -> Tensor:
    """Multiply each expert's rows by its matrix; ``rows`` and the result have the layout of `Plan.dispatch`."""
    rows, weight_EIO = to_autocast(rows, weight_EIO)
    if plan.capacity is not None:
        return torch.bmm(rows, weight_EIO)
    counts = None if has_grouped_kernel(rows, weight_EIO) else plan.count_E
    return grouped_linear(rows, weight_EIO, plan.gating.kept_E, counts)
