"""Read single snapshots of a dataset directly from its files, and prefetch batches of them.

The caller decides which snapshots are in each batch before it is read. So the order does not depend on the number of
workers, and training can resume at any step. Only solid masks are cached.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import UserError
from shodh_moe.data.direct import Places, find_places, read_places, unpack_bits
from shodh_moe.data.listing import domain_names
from shodh_moe.data.reading import TrajectoryRecord, read_snapshots
from shodh_moe.data.sampler import DomainSampler

# Masks are stored as bits: this is enough for two thousand trajectories of 128^3.
MASK_BUDGET_BYTES = 2**29
# One thread reads 128^3 snapshots at about memory speed, so a few are enough for any disk.
MOST_THREADS = 4


class Snapshots:
    """All snapshots of the given trajectories in order, each float32 [5, X, Y, Z] = velocity, pressure, solid.

    Thread-safe. Files are open only while they are read.

    Args:
        records: from `list_trajectories`, all with the same grid.
        domains: names in the order of their domain indices; default: those of ``records`` in alphabetical order.

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
        """Indices of all snapshots of a domain."""
        return [int(index) for index in self._of_domain[domain]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of snapshots of each domain."""
        return tuple(len(indices) for indices in self._of_domain)

    def indices(self, samples: Iterable[tuple[int, int]]) -> list[int]:
        """Convert the (domain, index within the domain) pairs that a `DomainSampler` draws to indices of snapshots."""
        return [int(self._of_domain[domain][within]) for domain, within in samples]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """The domain index of each snapshot, int64 [B]."""
        return torch.from_numpy(self._domain[list(indices)])

    def read(self, index: int, out_5XYZ: NDArray[np.float32]) -> None:
        """Read one snapshot into a contiguous array.

        Raises:
            UserError: the file is missing or damaged, its shape has changed, or a value is not finite.
        """
        number, snapshot = self._find(index)
        record, mask = self.records[number], self._masks.get(number)
        if number not in self._places:
            self._places[number] = find_places(record)
        places = self._places[number]
        # The HDF5 library reads the first snapshot: it gives the mask and detects a damaged file.
        if mask is not None and places is not None:
            if read_places(record.path, places, snapshot, out_5XYZ[:4]):
                unpack_bits(mask, out_5XYZ[4].reshape(-1))
                return
            # The file has changed or is bad.
            self._places[number] = find_places(record)
        fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
        out_5XYZ[:4], out_5XYZ[4:] = fields_T4XYZ[0], solid_1XYZ
        if self._places[number] is not None:
            self._masks.put(number, solid_1XYZ[0])

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Read several snapshots, [B, 5, X, Y, Z]. Raises `UserError` like `read`."""
        (batch_B5XYZ,) = read_batches(self, [indices])
        return batch_B5XYZ

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"snapshot {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - self._ends[number]) + self.records[number].n_snapshots


class _Masks:
    """The most recently used solid masks, with one bit per cell, up to `MASK_BUDGET_BYTES`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> NDArray[np.uint8] | None:
        """Return the packed mask of a trajectory; None if it is not stored."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            return self._kept.get(number)

    def put(self, number: int, mask_XYZ: NDArray[np.float32]) -> None:
        """Store a mask. A mask with values other than 0 and 1 is not stored; the HDF5 library rereads it each time."""
        solid_XYZ = mask_XYZ == 1
        with self._lock:
            self._kept.pop(number, None)
            if np.array_equal(solid_XYZ, mask_XYZ):
                self._kept[number] = np.packbits(solid_XYZ)
            while len(self._kept) * mask_XYZ.size / 8 > MASK_BUDGET_BYTES:
                self._kept.popitem(last=False)


def reading_threads() -> int:
    """Return a good number of threads for `read_batches` in this process."""
    return min(available_cores(), MOST_THREADS)


def read_batches(
    snapshots: Snapshots, batches: Iterable[Sequence[int]], workers: int = 0, ahead: int = 2, pin: bool = False
) -> Iterator[Tensor]:
    """Yield one batch [B, 5, X, Y, Z] for each list of indices in ``batches``, in order.

    ``workers`` threads read up to ``ahead`` batches in advance; with 0, each batch is read on request. ``batches`` may
    be endless. ``pin`` uses page-locked memory, from which a GPU copies asynchronously
    (``.to(device, non_blocking=True)``).

    Raises:
        UserError: like `Snapshots.read`, when the batch is yielded.
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
    """Yield the indices of this rank's micro-batches from step ``start`` on, without end; each mixes all domains."""
    return (snapshots.indices(sampler.batch(step, rank)) for step in count(start))
