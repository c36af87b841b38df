"""What a rank holds of the logical tensors of a checkpoint.

A logical tensor is a parameter (or a moment of its optimizer) as it is without any parallelism: all experts of a
layer stacked over the global expert axis 0. A rank holds runs of its elements, whatever the expert-parallel size and
the ZeRO stage are.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from shodh_moe.parallel import ExpertParallel

EXPERT_MARK = ".experts."  # tensors under this name are stacked [local experts, ...]


class Fragment(NamedTuple):
    """A run of consecutive elements of one logical tensor."""

    name: str  # "model/<parameter>", "exp_avg/<parameter>", "exp_avg_sq/<parameter>"
    start: int  # first element, in the flattened logical tensor
    values: Tensor  # 1-D view of live memory, any device


def logical_shape(name: str, local: Tensor, ep: ExpertParallel) -> list[int]:
    """Shape of the whole tensor of which this rank holds ``local``."""
    shape = list(local.shape)
    return [shape[0] * ep.size, *shape[1:]] if EXPERT_MARK in name and shape else shape


def first_element(name: str, local: Tensor, ep: ExpertParallel) -> int:
    """Where ``local`` begins in the flattened whole tensor."""
    return ep.rank * local.numel() if EXPERT_MARK in name else 0


def model_fragments(model: nn.Module, ep: ExpertParallel) -> tuple[list[Fragment], dict[str, list[int]]]:
    """Everything of ``model/*`` that this rank holds, and the shapes of the logical tensors.

    Ranks hold the tensors outside the experts in common: to save, each of them must come from one rank alone.
    """
    fragments, shapes = [], {}
    for name, local in model.state_dict().items():
        key = f"model/{name}"
        fragments.append(Fragment(key, first_element(name, local, ep), local.detach().view(-1)))
        shapes[key] = logical_shape(name, local, ep)
    return fragments, shapes
