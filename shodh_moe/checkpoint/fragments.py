"""Fragments: the parts of a checkpoint's logical tensors that one rank holds.

A logical tensor is a parameter (or one of its optimizer moments) as it would be without parallelism, with all experts
of a layer stacked along axis 0. At any expert-parallel size and ZeRO stage, a rank holds runs of consecutive elements.
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


def first_element(local: Tensor, ep: ExpertParallel) -> int:
    """Index of the first element of ``local`` in the flattened logical tensor."""
    return ep.rank * local.numel() if marks(local).sharded else 0


def model_fragments(model: nn.Module, ep: ExpertParallel) -> tuple[list[Fragment], dict[str, list[int]]]:
    """Return this rank's fragments of all ``model/*`` tensors, and the shapes of the logical tensors by name.

    Every rank holds all tensors outside the experts. When saving, only one rank may contribute each of them.
    """
    fragments, shapes = [], {}
    for name, local in model.state_dict(keep_vars=True).items():
        key = f"model/{name}"
        fragments.append(Fragment(key, first_element(local, ep), local.detach().view(-1)))
        shapes[key] = logical_shape(local, ep)
    return fragments, shapes
