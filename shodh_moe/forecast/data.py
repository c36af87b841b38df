"""Samples of fields for the peers, and the flows that all models forecast.

Shapes: B batch, H given snapshots, T observed ones, N forecast ones, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.data import Snapshots, TrajectoryRecord, list_trajectories, read_batches, read_trajectory
from shodh_moe.data.sampler import DomainSampler


class Windows:
    """Samples of H + 1 successive snapshots of the same trajectory, grouped by domain.

    Attributes:
        sizes: number of samples of each domain, for `DomainSampler`.
    """

    def __init__(self, records: Sequence[TrajectoryRecord], history: int) -> None:
        self._snapshots, self._length = Snapshots(records), history + 1
        self._starts: list[list[int]] = [[] for _ in self._snapshots.domains]
        first = 0
        for record in self._snapshots.records:
            starts = range(first, first + record.n_snapshots - history)
            self._starts[self._snapshots.domains.index(record.domain)].extend(starts)
            first += record.n_snapshots

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._starts))

    def batches(self, sampler: DomainSampler) -> Iterator[Tensor]:
        """Yield the sampler's micro-batches, float32 [B, H + 1, 5, X, Y, Z], without end; a thread reads ahead."""
        picks = (self._snapshots_of(sampler.batch(step, 0)) for step in count())
        for fields in read_batches(self._snapshots, picks, workers=1):
            yield fields.view(-1, self._length, *fields.shape[1:])

    def _snapshots_of(self, samples: list[tuple[int, int]]) -> list[int]:
        starts = [self._starts[domain][index] for domain, index in samples]
        return [start + offset for start in starts for offset in range(self._length)]


@dataclass(frozen=True)
class Flow:
    """A flow up to the moment at which a forecast begins.

    Attributes:
        fields_T4XYZ: all snapshots of velocity and pressure until then, float32, in the units of the data.
        solid_1XYZ: 1 in solid voxels, 0 in fluid, float32.
        domain: name of the domain.
    """

    fields_T4XYZ: Tensor
    solid_1XYZ: Tensor
    domain: str


def flows(record: TrajectoryRecord, history: int, steps: int, starts: int) -> Iterator[tuple[Flow, Tensor]]:
    """Yield flows of a trajectory, and the ``steps`` snapshots that follow in truth, float32 [N, 4, X, Y, Z].

    Raises:
        UserError: a file is damaged.
    """
    trajectory = read_trajectory(record)
    fields_T4XYZ = torch.cat(
        [torch.from_numpy(trajectory.velocity_T3XYZ), torch.from_numpy(trajectory.pressure_T1XYZ)], 1
    )
    solid_1XYZ = torch.from_numpy(trajectory.solid_1XYZ)
    for start in begins(record.n_snapshots, history, steps, starts):
        yield Flow(fields_T4XYZ[:start], solid_1XYZ, record.domain), fields_T4XYZ[start : start + steps]


def begins(snapshots: int, history: int, steps: int, starts: int) -> list[int]:
    """Numbers of the first forecast snapshot: ``starts`` or fewer, evenly spaced from the first possible to the last.

    A single one is the first possible.
    """
    first, last = history, snapshots - steps
    if starts == 1:
        return [first]
    return sorted({round(first + (last - first) * number / (starts - 1)) for number in range(starts)})


def require_long_enough(records: Sequence[TrajectoryRecord], history: int, steps: int) -> None:
    """Raise `UserError` if a trajectory is too short for a forecast of ``steps`` snapshots."""
    for record in records:
        if record.n_snapshots < history + steps:
            raise UserError(
                f"{record.path} has {record.n_snapshots} snapshots, too few for base.model.history {history} and a "
                f"forecast of {steps} steps: give trajectories of {history + steps} or more, or lower steps"
            )


def periods(config: Config) -> dict[str, float]:
    """The nominal period of each domain's pulse in snapshots, as far as the config states it.

    Each trajectory draws its own periods within 25 % of it, which the config does not know. Imported data have none.
    """
    if config.data.path:
        return {}
    found = {}
    for name, domain in config.data.domains.items():
        period = getattr(domain, "pulse_period", None)
        if period and getattr(domain, "pulse", 0) > 0:
            found[name] = float(period) / domain.steps_per_snapshot
    return found


def dataset_records(config: Config, dataset: Path, split: str) -> list[TrajectoryRecord]:
    """The trajectories of a split of the benchmark's data."""
    return list_trajectories(dataset, split, config.data.grid, config.data.skip_bad)
