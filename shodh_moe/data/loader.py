"""The snapshots of a dataset, one at a time straight from its files, and batches of them read ahead.

What is in a batch is decided before it is read, by whoever asks for it: its order does not depend on the number of
workers, and a training goes on at any step by asking from there on. Nothing is kept but the solid masks.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.data.direct import Places, find_places, read_places, unpack_bits
from shodh_moe.data.listing import domain_names
from shodh_moe.data.reading import TrajectoryRecord, read_snapshots
from shodh_moe.data.sampler import DomainSampler

# Masks are kept as bits: at 128^3 this holds those of two thousand trajectories.
MASK_BUDGET_BYTES = 2**29
# Threads; one alone reads 128^3 snapshots at about the speed of memory, so a few do for any disk.
WORKERS = min(os.cpu_count() or 1, 4)


class Snapshots:
    """Every snapshot of some trajectories, in their order; fields float32 [5, X, Y, Z] = velocity, pressure, solid.

    Safe to use from several threads. Files are open only while they are read.

    Args:
        records: from `list_trajectories`, all of one grid.
        domains: the names that domain indices count; those of ``records`` in alphabetical order by default.

    Raises:
        UserError: a domain is not in ``domains``.
    """

    def __init__(self, records: Sequence[TrajectoryRecord], domains: Sequence[str] | None = None) -> None:
        self.records = list(records)
        self.domains = list(domains) if domains is not None else domain_names(records)
        for record in self.records:
            if record.domain not in self.domains:
                raise UserError(f"{record.path} is of domain {record.domain!r}, not one of {', '.join(self.domains)}")
        lengths = [record.n_snapshots for record in self.records]
        self._ends = np.cumsum(lengths)
        self._domain = np.repeat([self.domains.index(record.domain) for record in self.records], lengths)
        self._of_domain = [np.flatnonzero(self._domain == number) for number in range(len(self.domains))]
        self._masks = _Masks()
        self._places: dict[int, Places | None] = {}

    def __len__(self) -> int:
        return len(self._domain)

    def record(self, index: int) -> TrajectoryRecord:
        """The trajectory that a snapshot belongs to."""
        return self.records[self._find(index)[0]]

    def of_domain(self, domain: int) -> list[int]:
        """The indices of all snapshots of a domain."""
        return [int(index) for index in self._of_domain[domain]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Snapshots per domain."""
        return tuple(len(indices) for indices in self._of_domain)

    def indices(self, samples: Iterable[tuple[int, int]]) -> list[int]:
        """The indices of (domain, index within the domain) pairs, as a `DomainSampler` draws them."""
        return [int(self._of_domain[domain][within]) for domain, within in samples]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """The domain index of each snapshot, int64 [B]."""
        return torch.from_numpy(self._domain[list(indices)])

    def read(self, index: int, out_5XYZ: NDArray[np.float32]) -> None:
        """One snapshot into a contiguous array.

        Raises:
            UserError: the file is missing, damaged or changed its shape, or a value is not finite.
        """
        number, snapshot = self._find(index)
        record, mask = self.records[number], self._masks.get(number)
        if number not in self._places:
            self._places[number] = find_places(record)
        places = self._places[number]
        # The first snapshot is read by the library, which gives the mask and finds out what is wrong with the file.
        if mask is not None and places is not None:
            if read_places(record.path, places, snapshot, out_5XYZ[:4]):
                unpack_bits(mask, out_5XYZ[4].reshape(-1))
                return
            # The file was changed since, or is bad.
            self._places[number] = find_places(record)
        fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
        out_5XYZ[:4], out_5XYZ[4:] = fields_T4XYZ[0], solid_1XYZ
        if self._places[number] is not None:
            self._masks.put(number, solid_1XYZ[0])

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Some snapshots, [B, 5, X, Y, Z]. Raises `UserError` as `read` does."""
        (batch_B5XYZ,) = read_batches(self, [indices])
        return batch_B5XYZ

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"snapshot {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - self._ends[number]) + self.records[number].n_snapshots


class _Masks:
    """The solid masks that were used last, a bit a cell, as many as fit into the budget."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> NDArray[np.uint8] | None:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            return self._kept.get(number)

    def put(self, number: int, mask_XYZ: NDArray[np.float32]) -> None:
        """Keep a mask. One with values other than 0 and 1 is not kept, and the library reads it each time."""
        solid_XYZ = mask_XYZ == 1
        with self._lock:
            self._kept.pop(number, None)
            if np.array_equal(solid_XYZ, mask_XYZ):
                self._kept[number] = np.packbits(solid_XYZ)
            while len(self._kept) * mask_XYZ.size / 8 > MASK_BUDGET_BYTES:
                self._kept.popitem(last=False)


def read_batches(
    snapshots: Snapshots, batches: Iterable[Sequence[int]], workers: int = 0, ahead: int = 2, pin: bool = False
) -> Iterator[Tensor]:
    """The snapshots whose indices each of ``batches`` lists, [B, 5, X, Y, Z], in that order.

    ``workers`` threads read up to ``ahead`` batches in advance; with 0 each is read when it is asked for.
    ``batches`` may be endless, and decides alone what comes when. ``pin`` puts them into page-locked memory, from
    which a GPU copies without waiting (``.to(device, non_blocking=True)``).

    Raises:
        UserError: as `Snapshots.read`, when the batch's turn comes.
    """
    shape = (5, *snapshots.records[0].grid)
    if not workers:
        for indices in batches:
            batch_B5XYZ = torch.empty(len(indices), *shape, pin_memory=pin)
            for index, out_5XYZ in zip(indices, batch_B5XYZ.numpy(), strict=True):
                snapshots.read(index, out_5XYZ)
            yield batch_B5XYZ
        return
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="read-snapshots") as pool:
        try:
            for indices in batches:
                batch_B5XYZ = torch.empty(len(indices), *shape, pin_memory=pin)
                places = zip(indices, batch_B5XYZ.numpy(), strict=True)
                waiting.append((batch_B5XYZ, [pool.submit(snapshots.read, *place) for place in places]))
                if len(waiting) > ahead:
                    yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: deque[tuple[Tensor, list[Future[None]]]]) -> Tensor:
    batch_B5XYZ, reads = waiting.popleft()
    for read in reads:
        read.result()
    return batch_B5XYZ


def mixed_batches(sampler: DomainSampler, snapshots: Snapshots, rank: int = 0, start: int = 0) -> Iterator[list[int]]:
    """The indices of this rank's micro-batches from step ``start`` on, without end: all domains in each of them."""
    return (snapshots.indices(sampler.batch(step, rank)) for step in count(start))
