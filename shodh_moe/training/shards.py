"""Shards: the elements of weights and optimizer state that this rank updates, at every ZeRO stage.

Without ZeRO a rank updates whole parameters; with ZeRO it updates a contiguous part of each flattened parameter group.
In both cases a shard is a run of consecutive elements of a parameter. In the logical tensor, whose first axis counts
the experts of all ranks, they are consecutive as long as their experts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shodh_moe.base.parameters import marks
from shodh_moe.base.tensors import sent_numbers
from shodh_moe.checkpoint import Fragment, logical_shape, runs
from shodh_moe.parallel import ExpertParallel, Layout
from shodh_moe.training.optimizer import MOMENTS


@dataclass(frozen=True)
class Shard:
    """Consecutive elements of one parameter that this rank updates.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter on this rank; for experts, the local ones.
        group: index of its parameter group, where ZeRO keeps the gradients.
        start: first element in the flattened local parameter.
        master: the tensor that the optimizer updates: the parameter itself, or ZeRO's part of the flattened group.
        offset: first element in the flattened ``master``.
        count: number of elements.
        owned: whether this rank saves and counts the elements; exactly one of the ranks that hold them does.
    """

    name: str
    parameter: nn.Parameter
    group: int
    start: int
    master: Tensor
    offset: int
    count: int
    owned: bool

    def of(self, flat: Tensor) -> Tensor:
        """Return the shard's part, [count], of a tensor with the shape of ``master``."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)


def shards_without_zero(model: nn.Module, rank: int, layout: Layout) -> list[Shard]:
    """Return one shard per parameter. Ranks that hold the same parameters own them in turn, to share the writing."""
    found = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        sharded = marks(parameter).sharded
        replicas, replica = (layout.replicas, layout.replica(rank)) if sharded else (layout.world, rank)
        found.append(Shard(name, parameter, 0, 0, parameter, 0, parameter.numel(), index % replicas == replica))
    return found


def shards_of_zero(model: nn.Module, zero: Any) -> list[Shard]:
    """Return this rank's shards in DeepSpeed's ZeRO 1 and 2 optimizer; no two ranks hold the same elements."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group, parameters in enumerate(zero.bit16_groups):
        for parameter in parameters:
            if mapping := parameter._hp_mapping:
                start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                master = zero.single_partition_of_fp32_groups[group]
                found.append(Shard(names[parameter], parameter, group, start, master, at.start, at.numel, True))
    return found


def fragments(
    shards: list[Shard], optimizer: torch.optim.Optimizer, ep: ExpertParallel, all_held: bool
) -> list[Fragment]:
    """Return weights and moments of the shards as parts of logical tensors.

    Args:
        all_held: include shards that another rank owns; needed to load, not to save.
    """
    found = []
    for shard in shards:
        if all_held or shard.owned:
            values = {"model": shard.master, **{key: optimizer.state[shard.master][key] for key in MOMENTS}}
            for start, first, count in runs(shard.parameter, ep, shard.start, shard.count):
                for key, flat in values.items():
                    found.append(Fragment(f"{key}/{shard.name}", start, shard.of(flat)[first : first + count]))
    return found


def logical_shapes(model: nn.Module, ep: ExpertParallel) -> dict[str, list[int]]:
    """Return the shapes of all logical tensors in a checkpoint of this model, by name."""
    shapes = {}
    for name, parameter in model.named_parameters():
        shape = logical_shape(parameter, ep)
        shapes.update({f"{kind}/{name}": shape for kind in ("model", *MOMENTS)})
    return shapes


def squared_norms(
    gradients: list[tuple[Shard, Tensor]], layer_of: dict[str, int], layers: int, experts: int, ep: ExpertParallel
) -> Tensor:
    """Return squared L2 norms of the gradients that this rank owns. Summed over all ranks, every element counts once.

    Args:
        gradients: shards and their flat gradients.
        layer_of: MoE layer of each expert parameter, by parameter name.

    Returns:
        float64 [layers * E + 1]: each expert of each layer, then everything else.
    """
    device = gradients[0][1].device if gradients else torch.device("cpu")
    table = torch.zeros(layers * experts + 1, dtype=torch.float64, device=device)
    places: list[int] = []
    squares: list[Tensor] = []
    for shard, gradient in gradients:
        if not shard.owned:
            continue
        if shard.name not in layer_of:
            places.append(layers * experts)
            squares.append(_square(gradient))
            continue
        size = shard.parameter[0].numel()
        first, held = layer_of[shard.name] * experts, ep.local_experts(experts)
        for expert in range(shard.start // size, -(-(shard.start + shard.count) // size)):
            low, high = max(expert * size - shard.start, 0), min((expert + 1) * size - shard.start, shard.count)
            places.append(first + held[expert])
            squares.append(_square(gradient[low:high]))
    if places:
        table.index_add_(0, sent_numbers(places, device), torch.stack(squares))
    return table


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
