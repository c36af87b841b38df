"""The tensors of a path mixture, made from those of its domain experts (DESIGN 3.4).

Shapes: E experts, I inputs, O outputs, D model width, F hidden width of an expert.

What a path has for itself is the expert's, what it has not is the experts' mean:

    expert         embedding and head    feed-forward              attention's projections      biases, norms
    dense          W_e, no shared part   Expert_e, none shared     as configured: W_e or mean   mean
    single path    stacked, shared mean  stacked, shared mean      stacked, shared mean         mean
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shodh_moe.merging.inputs import Stored

Read = Callable[[int, str], Tensor]  # the whole tensor of an expert, by the expert's number and the tensor's name
ROUTER = "path.router."  # beginning of the names of a router's weights
_PER_EXPERT = re.compile(r"\.(routed_EIO|narrow_EIQ|widen_EQO|gate_up_LDF|down_LFD)$")
_SHARED_EXPERT = re.compile(r"(blocks\.\d+\.moe)\.shared\.(\d+)\.(gate_up|down)\.weight$")
_LINEAR = re.compile(r"(embed|head|blocks\.\d+\.attention\.(?:qkv|out))\.weight$")


@dataclass(frozen=True)
class MixtureTensor:
    """One tensor of the mixture.

    Attributes:
        shape, dtype: of the whole tensor.
        pieces: functions that make its parts along the first axis, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Callable[[Read], Tensor]]


def mixture_tensors(tensors: dict[str, Stored], experts: int, dense: bool, attention: str) -> dict[str, MixtureTensor]:
    """Describe the tensors of a mixture without its router's.

    Args:
        tensors: those of each expert.
        experts: E.
        dense: whether the experts are dense networks.
        attention: ``model.moe.attention`` of the mixture.
    """
    made: dict[str, MixtureTensor] = {}
    for name, stored in tensors.items():
        shape, dtype = stored.shape, stored.dtype

        def add(new: str, piece: Callable[[int, Read], Tensor], one: tuple[int, ...], dtype: torch.dtype) -> None:
            made[new] = MixtureTensor((experts, *one), dtype, [partial(piece, e) for e in range(experts)])

        if name.startswith(ROUTER):
            continue
        if dense and (found := _SHARED_EXPERT.match(name)):
            if found[2] != "0":
                continue  # it is part of the tensor made for the first one
            parts = sum(f"{found[1]}.shared.{j}.{found[3]}.weight" in tensors for j in range(len(tensors)))
            if found[3] == "gate_up":
                size = (shape[1], parts * shape[0])
                add(f"{found[1]}.experts.gate_up_LDF", partial(_gate_up, found[1], parts), size, dtype)
            else:
                size = (parts * shape[1], shape[0])
                add(f"{found[1]}.experts.down_LFD", partial(_down, found[1], parts), size, dtype)
        elif dense and (found := _LINEAR.match(name)) and (attention == "own" or found[1] in ("embed", "head")):
            add(f"{found[1]}.routed_EIO", partial(_transposed, name), (shape[1], shape[0]), dtype)
        elif _PER_EXPERT.search(name):
            add(name, partial(_own, name), shape[1:], dtype)
        else:
            made[name] = MixtureTensor(shape, dtype, [partial(_mean, name, experts)])
    return made


def known_tensor(tensor: Tensor) -> MixtureTensor:
    """A tensor that is not made from the experts'."""

    def piece(read: Read) -> Tensor:
        return tensor

    return MixtureTensor(tuple(tensor.shape), tensor.dtype, [piece])


def _own(name: str, expert: int, read: Read) -> Tensor:
    return read(expert, name)


def _mean(name: str, experts: int, read: Read) -> Tensor:
    """The experts' mean, summed in float64; integers and equal tensors are the first expert's, bit for bit."""
    first = read(0, name)
    if not first.is_floating_point():
        return first
    total, equal = first.double(), True
    for expert in range(1, experts):
        other = read(expert, name)
        equal = equal and torch.equal(other, first)
        total += other
    return first if equal else total.div_(experts).to(first.dtype)


def _transposed(name: str, expert: int, read: Read) -> Tensor:
    """W_e^T, [I, O]."""
    return read(expert, name).T


def _gate_up(layer: str, parts: int, expert: int, read: Read) -> Tensor:
    """Gate and up of all shared experts as one network, [D, 2 F]: first all gates, then all ups."""
    halves = [read(expert, f"{layer}.shared.{j}.gate_up.weight").chunk(2) for j in range(parts)]
    return torch.cat([half[side] for side in (0, 1) for half in halves]).T


def _down(layer: str, parts: int, expert: int, read: Read) -> Tensor:
    """The down projections of all shared experts as one network, [F, D]."""
    return torch.cat([read(expert, f"{layer}.shared.{j}.down.weight") for j in range(parts)], dim=1).T
