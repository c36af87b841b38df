"""Fragments: the parts of a checkpoint's logical tensors that one rank holds.

A logical tensor is a parameter (or one of its optimizer moments) as it would be without parallelism, with all experts
of a layer stacked along axis 0. At any expert-parallel size, placement of the experts and ZeRO stage, a rank holds runs
of consecutive elements.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from shodh_moe.base.parameters import marks
from shodh_moe.parallel import ExpertParallel


class Fragment(NamedTuple):
    """A run of consecutive elements of one logical tensor."""

    name: str  # "model/<parameter>", "exp_avg/<parameter>", "exp_avg_sq/<parameter>"
    start: int  # first element, in the flattened logical tensor
    values: Tensor  # 1-D view of live memory, any device


def logical_shape(local: Tensor, ep: ExpertParallel) -> list[int]:
    """Shape of the logical tensor to which ``local``, a parameter (or buffer) on this rank, belongs."""
    shape = list(local.shape)
    return [shape[0] * ep.size, *shape[1:]] if marks(local).sharded else shape


def runs(local: Tensor, ep: ExpertParallel, start: int, count: int) -> list[tuple[int, int, int]]:
    """Divide elements of a flattened parameter (or buffer) into runs that are consecutive in the logical tensor.

    Args:
        start, count: the elements of ``local``.

    Returns:
        For each run its first element in the logical tensor, its first element after ``start``, and their number.
    """
    if not marks(local).sharded:
        return [(start, 0, count)]
    size, end = local[0].numel(), start + count
    found: list[tuple[int, int, int]] = []
    held = ep.local_experts(len(local) * ep.size)
    for place in range(start // size, -(-end // size)):
        first, last = max(place * size, start), min((place + 1) * size, end)
        begin = held[place] * size + first - place * size
        if found and found[-1][0] + found[-1][2] == begin:
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + last - first)
        else:
            found.append((begin, first - start, last - first))
    return found


def model_fragments(model: nn.Module, ep: ExpertParallel) -> tuple[list[Fragment], dict[str, list[int]]]:
    """Return this rank's fragments of all ``model/*`` tensors, and the shapes of the logical tensors by name.

    Every rank holds all tensors outside the experts. When saving, only one rank may contribute each of them.
    """
    fragments, shapes = [], {}
    for name, local in model.state_dict(keep_vars=True).items():
        key = f"model/{name}"
        for start, first, count in runs(local, ep, 0, local.numel()):
            fragments.append(Fragment(key, start, local.detach().view(-1)[first : first + count]))
        shapes[key] = logical_shape(local, ep)
    return fragments, shapes
