"""Measurements of one rank for ``shodh plan --measure``, made by all ranks of a node at the same time.

Each result is the median over repetitions of the slowest rank. Operations are those of a training, in its sizes: matrix
products in the three orders of a linear map's passes, fused attention, elementwise operations, and the collectives of a
step. As in a training, inputs have not been used for a while and results are kept, so both are rarely in a cache.
`own_costs` measures what the code takes besides.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.plan.clock import seconds
from shodh_moe.plan.machine import KINDS, Curve, Kind, Link, Rates
from shodh_moe.plan.own_costs import own_costs

SIDES = {"cpu": (32, 64, 128, 256, 512), "cuda": (64, 256, 1024, 4096)}
NUMBERS = {"cpu": (2**12, 2**15, 2**18, 2**21, 2**23), "cuda": (2**14, 2**18, 2**22, 2**26)}
TOKENS = {"cpu": (64, 256, 1024), "cuda": (512, 4096)}
COLD = 2**26  # bytes of operands, between which an operation takes turns
SENT = (2**10, 2**16, 2**20, 2**23)  # bytes


def measure_rates(device: torch.device, precisions: tuple[str, ...]) -> Rates:
    """Measure everything (collective: every rank of the node calls it).

    Args:
        precisions: dtypes of the products.
    """
    kind = device.type
    dtypes = {name: getattr(torch, name) for name in precisions}
    pairs = {name: [attention(tokens, dtype, device) for tokens in TOKENS[kind]] for name, dtype in dtypes.items()}
    links = {one: link(one, device) for one in KINDS} if dist.get_world_size() > 1 else {}
    return Rates(
        products={
            name: Curve(points=[product(side, dtype, device) for side in SIDES[kind]]) for name, dtype in dtypes.items()
        },
        attention={name: Curve(points=[forward for forward, _ in pair]) for name, pair in pairs.items()},
        attention_backward={name: Curve(points=[backward for _, backward in pair]) for name, pair in pairs.items()},
        memory=Curve(points=[elementwise(numbers, device) for numbers in NUMBERS[kind]]),
        **own_costs(device),
        links=links,
    )


def product(side: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """FLOPs and rate of products of 2 n rows with an n x n matrix, and those of their backward pass."""
    turns = _turns(lambda: [torch.randn(rows, side, dtype=dtype, device=device) for rows in (2 * side, 2 * side, side)])
    flops = 4.0 * side**3

    def passes() -> None:
        x, y, weight = next(turns)
        kept.append((x @ weight.t(), y @ weight, y.t() @ x))

    kept: deque[Any] = deque(maxlen=8)
    return flops, 3 * flops / seconds(passes, device)


def attention(tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[tuple[float, float], ...]:
    """FLOPs and rate of attention, forward and backward: 4 heads of width 32, or 16 of 64 on a GPU."""
    heads, width, samples = (16, 64, 4) if device.type == "cuda" else (4, 32, max(1, 256 // tokens))
    shape = (samples, heads, tokens, width)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    flops = 4.0 * samples * heads * tokens**2 * width

    def both() -> None:
        y = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(y, (q, k, v), y.detach())

    with torch.no_grad():
        forward = seconds(lambda: F.scaled_dot_product_attention(q, k, v), device)
    backward = max(seconds(both, device) - forward, 0.1 * forward)
    return (flops, flops / forward), (2 * flops, 2 * flops / backward)


def _turns(make: Callable[[], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Endlessly yield operands, of as many sets as `COLD` bytes hold, but at most 500."""
    first = make()
    sets = min(500, max(1, COLD // sum(one.nbytes for one in first)))
    return itertools.cycle([first, *(make() for _ in range(sets - 1))])


def elementwise(numbers: int, device: torch.device) -> tuple[float, float]:
    """Mean bytes of an operation, and the rate, over a mixture of operations on float32 numbers in rows of 64."""
    turns = _turns(lambda: [torch.randn(numbers // 64, 64, device=device) for _ in range(2)])
    kept: deque[Any] = deque(maxlen=max(1, min(COLD // (24 * numbers), 500)))
    scale = torch.randn(64, device=device)
    one, few = torch.randn(1, device=device), 5
    sizes = 4 * numbers * (2 + 3 + 2 + 2 + 4)

    def mixture() -> None:
        a, b = next(turns)
        kept.append((a * scale, a + b, F.silu(a), a.pow(2), torch.cat([a, b])))

    for _ in range(2 * (kept.maxlen or 1)):  # until the allocator has all the memory that it needs
        mixture()
    started = few * seconds(lambda: one * one, device) if device.type == "cpu" else 0.0
    taken = seconds(mixture, device)
    return sizes / few, sizes / max(taken - started, 0.3 * taken)


def link(kind: Kind, device: torch.device) -> Link:
    """Latency and rate of a collective among all ranks, fitted to its times at several sizes (collective)."""
    ranks = dist.get_world_size()
    times = []
    for sent in SENT:
        numbers = sent // 4 // ranks * ranks
        x, y = torch.zeros(numbers, device=device), torch.zeros(numbers, device=device)
        part = torch.zeros(numbers // ranks, device=device)
        calls: dict[Kind, Callable[[], object]] = {
            "all_reduce": lambda x=x: dist.all_reduce(x),  # type: ignore[misc]
            "all_gather": lambda x=x, part=part: dist.all_gather_into_tensor(x, part),  # type: ignore[misc]
            "reduce_scatter": lambda x=x, part=part: dist.reduce_scatter_tensor(part, x),  # type: ignore[misc]
            "all_to_all": lambda x=x, y=y: dist.all_to_all_single(y, x),  # type: ignore[misc]
        }
        times.append((4.0 * numbers, seconds(calls[kind], device)))
    return fitted_link(kind, ranks, times)


def fitted_link(kind: Kind, ranks: int, times: list[tuple[float, float]]) -> Link:
    """Fit hop and rate of `collective_seconds` in a node to measured (bytes, seconds), with equal relative errors."""
    twice = 2 if kind == "all_reduce" else 1
    rows = [(twice * (ranks - 1) / t, twice * (ranks - 1) / ranks * sent / t) for sent, t in times]
    matrix = np.array(rows)
    (hop, per_byte), *_ = np.linalg.lstsq(matrix, np.ones(len(times)), rcond=None)
    if hop < 0 or per_byte <= 0:  # one of them alone
        large = max(times)
        hop = max(float(min(1 / row[0] for row in rows)), 0.0) if per_byte <= 0 else 0.0
        per_byte = large[1] / (twice * (ranks - 1) / ranks * large[0])
    return Link(hop=float(hop), rate=float(1 / per_byte))
