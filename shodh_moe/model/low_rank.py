"""Low-rank additions to the matrices of a trained network (LoRA, arXiv 2106.09685).

A weight W becomes W + P, where P is the product of two narrow matrices: ``up`` [O, Q] and ``down`` [Q, I] for a linear
map [O, I], or ``down`` [E, I, Q] and ``up`` [E, Q, O] for a stack of experts [E, I, O]. ``up`` starts at zero, so the
network starts with the same outputs. `fold` adds the products to the weights, which then have their own names again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shodh_moe.base.parameters import mark, marks

_PART = ".parametrizations."


class LowRank(nn.Module):
    """Adds the product of two narrow matrices to a weight [O, I] or [E, I, O].

    Args:
        weight: the weight; the new parameters have its marks.
        rank: Q, at most the smaller size of one matrix.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        *stack, rows, columns = weight.shape
        rank = min(rank, rows, columns)
        inputs, outputs = (rows, columns) if stack else (columns, rows)
        down, up = (inputs, rank), (rank, outputs)
        bound = inputs**-0.5  # as in nn.Linear
        self.down = nn.Parameter(weight.new_empty(*stack, *(down if stack else down[::-1])).uniform_(-bound, bound))
        self.up = nn.Parameter(weight.new_zeros(*stack, *(up if stack else up[::-1])))
        own = marks(weight)
        for parameter in (self.down, self.up):
            mark(parameter, per_expert=own.per_expert, sharded=own.sharded, group=own.group)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + _product(self.down, self.up)


def add_low_rank(model: nn.Module, rank: int) -> list[LowRank]:
    """Give every matrix outside the routers a low-rank addition, and return the additions."""
    found = []
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() >= 2 and marks(weight).group != "router":
                found.append(LowRank(weight, rank))
                parametrize.register_parametrization(module, name, found[-1])
    return found


def fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add low-rank additions to their weights; other weights are returned unchanged."""
    folded = {name: tensor for name, tensor in weights.items() if _PART not in name}
    for name, tensor in weights.items():
        if not name.endswith(".original"):
            continue
        module, _, weight = name.removesuffix(".original").rpartition(_PART)
        down, up = (weights[f"{module}{_PART}{weight}.0.{part}"] for part in ("down", "up"))
        folded[f"{module}.{weight}"] = tensor + _product(down, up)
    return folded


def _product(down: Tensor, up: Tensor) -> Tensor:
    return torch.matmul(up, down) if down.dim() == 2 else torch.matmul(down, up)
