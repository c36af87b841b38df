"""What training reads: the index of a dataset folder and a torch dataset of its snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from shodh_moe.data.listing import domain_names
from shodh_moe.data.reading import TrajectoryRecord, read_snapshots
from shodh_moe.errors import UserError

RAM_BUDGET_BYTES = 4 * 2**30


class SnapshotDataset(Dataset[tuple[torch.Tensor, int]]):
    """Single snapshots: (fields float32 [5, X, Y, Z] = velocity 3, pressure 1, solid 1, unnormalised; domain index).

    Args:
        records: from `list_trajectories`.
        domains: the names that domain indices count; those of ``records`` in alphabetical order by default.
        ram_budget_bytes: snapshots are kept in memory if all of them fit, otherwise read from disk each time.

    Raises:
        UserError: a file is damaged, a value is not finite, or a domain is not in ``domains``.
    """

    def __init__(
        self,
        records: Sequence[TrajectoryRecord],
        domains: Sequence[str] | None = None,
        ram_budget_bytes: int = RAM_BUDGET_BYTES,
    ) -> None:
        self.records = list(records)
        self.domains = list(domains) if domains is not None else domain_names(records)
        for record in self.records:
            if record.domain not in self.domains:
                raise UserError(f"{record.path} is of domain {record.domain!r}, not one of {', '.join(self.domains)}")
        self._index = [(n, snapshot) for n, record in enumerate(self.records) for snapshot in range(record.n_snapshots)]
        self.in_memory = sum(record.nbytes for record in self.records) <= ram_budget_bytes
        self._cache = [read_snapshots(record) for record in self.records] if self.in_memory else []

    def __len__(self) -> int:
        return len(self._index)

    def record(self, index: int) -> TrajectoryRecord:
        """The trajectory that a snapshot belongs to."""
        return self.records[self._index[index][0]]

    def of_domain(self, domain: int) -> list[int]:
        """The indices of all snapshots of a domain."""
        name = self.domains[domain]
        return [index for index, (n, _) in enumerate(self._index) if self.records[n].domain == name]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        n, snapshot = self._index[index]
        record = self.records[n]
        if self.in_memory:
            fields_T4XYZ, solid_1XYZ = self._cache[n]
            fields_4XYZ = fields_T4XYZ[snapshot]
        else:
            fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
            fields_4XYZ = fields_T4XYZ[0]
        fields_5XYZ = torch.from_numpy(np.concatenate([fields_4XYZ, solid_1XYZ]))
        return fields_5XYZ, self.domains.index(record.domain)
