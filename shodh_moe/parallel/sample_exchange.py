"""Send each sample of a micro-batch once, to the rank that computes it, and its results back.

With one path per sample (``model.moe.scope`` path, ``router.context`` sample), every layer of a sample needs the same
expert. So the rank that holds this expert can compute the whole network for the sample, and no activation travels.

Shapes: G ranks in the expert-parallel group, B samples of this rank, R samples that it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.base.tensors import count_classes, sent_numbers
from shodh_moe.parallel.expert_parallel import ExpertParallel, all_to_all


class Share(NamedTuple):
    """Samples of rank ``home`` with experts on rank ``holder`` that rank ``rank`` computes: ``samples`` of them."""

    home: int
    holder: int
    rank: int
    samples: int


class SampleExchange:
    """Who computes which samples of one micro-batch, and their way there and back. All of it is collective.

    Args:
        ep: the expert-parallel group.
        holder_B: the rank of the group that holds each sample's expert, int64.
        capacity: the most samples that a rank computes, relative to an even share, at least 1.

    Attributes:
        held_G: number of samples whose experts each rank holds.
        computed_G: number of samples that each rank computes.
        strangers: number of samples, over all ranks, that are computed by a rank without their expert.
    """

    def __init__(self, ep: ExpertParallel, holder_B: Tensor, capacity: float):
        self._ep = ep
        count_G = count_classes(holder_B, ep.size)
        # Every rank sends its counts to all others.
        count_GG = all_to_all(count_G.expand(ep.size, -1), ep, direction="samples")
        counts = count_GG.tolist()
        self.held_G = [sum(column) for column in zip(*counts, strict=True)]
        shares = share_out(counts, capacity)
        self._send, self._receive, self.computed_G = [0] * ep.size, [0] * ep.size, [0] * ep.size
        self.strangers, ranks = 0, []
        for home, holder, rank, count in shares:
            self.computed_G[rank] += count
            self.strangers += count if rank != holder else 0
            if rank == ep.rank:
                self._receive[home] += count
            if home == ep.rank:
                self._send[rank] += count
                ranks += [rank] * count  # shares are sorted by holder, as are the samples below
        rank_B = torch.empty_like(holder_B)
        rank_B[torch.argsort(holder_B, stable=True)] = sent_numbers(ranks, holder_B.device)
        self._order_B = torch.argsort(rank_B, stable=True)

    def send(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Exchange the rows of several tensors in one message, without gradients.

        Args:
            columns: tensors of any shapes and dtypes with B rows each, on one device.

        Returns:
            The same tensors with the R rows that this rank computes.
        """
        sizes = [math.prod(column.shape[1:]) * column.itemsize for column in columns]
        packed = torch.cat([_bytes(column) for column in columns], dim=1)[self._order_B]
        received = all_to_all(packed, self._ep, self._send, self._receive, direction="samples")
        return [
            part.contiguous().view(column.dtype).view(len(received), *column.shape[1:])
            for part, column in zip(received.split(sizes, dim=1), columns, strict=True)
        ]

    def send_back(self, value_R: Tensor) -> Tensor:
        """Return the values of this rank's own samples, in their order, without gradients: [R, ...] -> [B, ...]."""
        received = all_to_all(value_R.detach(), self._ep, self._receive, self._send, direction="samples")
        value_B = torch.empty_like(received)
        value_B[self._order_B] = received
        return value_B


def _bytes(column: Tensor) -> Tensor:
    """View a tensor's rows as bytes, [B, bytes of a row]."""
    rows = column.detach().reshape(len(column), math.prod(column.shape[1:])).contiguous()
    return rows.view(torch.uint8)


def share_out(count_GG: list[list[int]], capacity: float) -> list[Share]:
    """Decide which rank computes how many samples. All ranks get the same result from the same counts.

    A sample goes to the rank that holds its expert while there is room, a rank's own samples first. What is left stays
    where it is while there is room, and then goes to any rank.

    Args:
        count_GG: number of samples of rank h whose experts are on rank d, at [h][d].
        capacity: room of a rank, relative to an even share of the samples, at least 1.

    Returns:
        Shares sorted by home, holder and rank. No rank computes more than ``ceil(capacity * samples / G)``.
    """
    ranks = range(len(count_GG))
    even = Fraction(sum(map(sum, count_GG)), len(count_GG))
    room = [math.ceil(Fraction(repr(float(capacity))) * even)] * len(count_GG)
    left = {(home, holder): count for home in ranks for holder, count in enumerate(count_GG[home]) if count}
    given: dict[tuple[int, int, int], int] = {}

    def give(home: int, holder: int, rank: int) -> None:
        count = min(left.get((home, holder), 0), room[rank])
        if count:
            given[home, holder, rank] = given.get((home, holder, rank), 0) + count
            left[home, holder] -= count
            room[rank] -= count

    for rank in ranks:
        give(rank, rank, rank)
    for home, holder in left:
        give(home, holder, holder)
    for home, holder in [pair for pair, count in left.items() if count]:
        for rank in (home, *ranks):
            give(home, holder, rank)
    return [Share(*key, count) for key, count in sorted(given.items())]
