"""Check whether a dataset can be trained on, before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.config.window import Window
from shodh_moe.data.listing import READ_BYTES, SPLITS, domain_names, list_trajectories
from shodh_moe.data.reading import read_snapshots
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.data.stats import FieldStats


def require_trainable(
    folder: Path,
    grid: Sequence[int],
    windows: Mapping[str, Window],
    batch_size: int,
    budget_bytes: int = READ_BYTES,
    skip_bad: bool = False,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Check the statistics, the header of every file in every split, and up to ``budget_bytes`` of values.

    Other values are checked when training reads them, so that a large dataset is not read twice. `check.check_files`
    lists all problems of a dataset; this function stops at the first one.

    Args:
        grid: the config's ``data.grid``.
        windows: the config's `windows`; every trajectory of a split must be long enough for that split's.
        batch_size: samples per micro-batch, which must be divisible among the domains.
        skip_bad: check only the files that `list_trajectories` does not skip; it lists the others on stderr.
        weights: the config's ``data.weights``.

    Raises:
        UserError: a file is missing, damaged or has another grid, a value is not finite, a trajectory is too short,
            or splits and domains do not fit the training.
    """
    FieldStats.load(folder)
    splits = {split: list_trajectories(folder, split, grid, skip_bad) for split in SPLITS}
    domains = domain_names(splits["train"])
    DomainSampler(tuple(1 for _ in domains), batch_size, seed=0, weights=domain_weights(weights, domains))
    for split, records in splits.items():
        if domain_names(records) != domains:
            raise UserError(
                f"{folder / 'data' / split} has the domains {', '.join(domain_names(records))}, the training split "
                f"{', '.join(domains)}: give every split trajectories of every domain"
            )
        for record in records:
            if record.n_snapshots < windows[split].snapshots:
                raise UserError(
                    f"{record.path} has {record.n_snapshots} snapshots, too few for {windows[split]}, which needs "
                    f"{windows[split].snapshots}: lower that or remove the file"
                )
    for record in (record for records in splits.values() for record in records):
        budget_bytes -= record.nbytes
        if budget_bytes < 0:
            break
        read_snapshots(record)
