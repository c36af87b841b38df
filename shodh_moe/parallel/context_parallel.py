"""The context-parallel (CP) group of a rank: each rank has a slab of every sample's tokens.

A sample's latent grid is cut along its first axis into slabs of equal size. Tokens are ordered with the last axis
fastest, so a slab is a run of consecutive tokens, and slabs in the order of their ranks make up the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shodh_moe.parallel.layout import Layout

# Newer versions of torch have a new name for each, and warn about the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class ContextParallel:
    """The slab of each sample that this rank has.

    Attributes:
        size: number of ranks that share a sample, G.
        rank: this rank's number among them.
        group: their process group; None: nothing can be gathered.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def slab(self, length: int) -> slice:
        """The part of an axis of this length that belongs to this rank.

        Raises:
            ValueError: ``size`` does not divide the length.
        """
        part, rest = divmod(length, self.size)
        if rest:
            raise ValueError(f"an axis of {length} cannot be cut into {self.size} slabs of equal size")
        return slice(self.rank * part, (self.rank + 1) * part)

    def whole(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The sizes of a whole sample along x, y and z, from those of a slab."""
        return grid[0] * self.size, grid[1], grid[2]

    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all ranks of the group, [G, ...], in order (collective, differentiable).

        The backward pass sums the gradients that all ranks have for this rank's tensor. So the gradients of parameters,
        summed over the ranks, are those of the sum of all ranks' losses.

        Args:
            x: of the same shape on every rank.
        """
        return x[None] if self.size == 1 else _Gather.apply(x, self)

    def gather_tokens(self, x: Tensor, dim: int) -> Tensor:
        """Return the tokens of whole samples; axis ``dim`` of ``x`` counts those of a slab (collective)."""
        return x if self.size == 1 else self.gather(x).movedim(0, dim).flatten(dim, dim + 1)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the ranks of the group, with equal bits on all of them (collective)."""
        return x if self.size == 1 else self.gather(x).mean(0)

    def std_and_mean(self, x_MSI: Tensor) -> tuple[Tensor, Tensor]:
        """Return standard deviation and mean over the tokens S of all slabs, without Bessel's correction, [M, I] each.

        Slabs are combined by their means and variances (Chan et al. 1979), as sums of squares would cancel.
        """
        if self.size == 1:
            return torch.std_mean(x_MSI, dim=1, correction=0)
        parts_G2MI = self.gather(torch.stack(torch.var_mean(x_MSI, dim=1, correction=0)))
        var_GMI, mean_GMI = parts_G2MI.unbind(1)
        mean_MI = mean_GMI.mean(0)
        return (var_GMI + (mean_GMI - mean_MI).square()).mean(0).sqrt(), mean_MI


ALONE = ContextParallel()


def join_context(layout: Layout, rank: int) -> ContextParallel:
    """Make the CP group of this rank (collective)."""
    if layout.cp == 1:
        return ContextParallel()
    group, _ = dist.new_subgroups_by_enumeration(layout.context_groups())
    return ContextParallel(layout.cp, layout.context_rank(rank), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: ContextParallel) -> Tensor:  # type: ignore[override]
        ctx.cp, ctx.shape = cp, x.shape
        gathered = x.new_empty(cp.size, *x.shape)
        _all_gather(gathered.view(-1), x.contiguous().view(-1), group=_ready(cp))
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        own = grad.new_empty(ctx.shape)
        _reduce_scatter(own.view(-1), grad.contiguous().view(-1), group=_ready(ctx.cp))
        return own, None


def _ready(cp: ContextParallel) -> dist.ProcessGroup:
    if cp.group is None:
        raise RuntimeError("the context-parallel group is not set: use join_context")
    return cp.group
