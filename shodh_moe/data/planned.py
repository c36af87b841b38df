"""The trajectories that a config asks for, as independent jobs, and which of them are still missing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import remove_leftovers
from shodh_moe.config import DataConfig
from shodh_moe.data.listing import SPLITS
from shodh_moe.data.reading import read_provenance
from shodh_moe.data.storage import existing_parent, free_bytes, needed_bytes
from shodh_moe.solvers import SOLVER_VERSION, SPLIT_BASE
from shodh_moe.solvers.domains import Domain


@dataclass(frozen=True)
class PlannedTrajectory:
    """One trajectory to generate.

    Attributes:
        path: the file to write.
        domain: name of its domain.
        config: settings of its domain.
        trajectory: its number, see `solvers.SPLIT_BASE`.
        request: JSON-like values that identify its content.
    """

    path: Path
    domain: str
    config: Domain
    trajectory: int
    request: dict[str, Any]


def planned_trajectories(config: DataConfig, folder: Path) -> list[PlannedTrajectory]:
    """List every trajectory that ``config`` asks for, with the domains interleaved."""
    jobs = []
    for split in SPLITS:
        domains = config.domains.items()
        most = max((getattr(domain.trajectories, split) for _, domain in domains), default=0)
        for index in range(most):
            for name, domain in domains:
                if index < getattr(domain.trajectories, split):
                    path = folder / "data" / split / f"{name}_{index:04d}.hdf5"
                    trajectory = SPLIT_BASE[split] + index
                    jobs.append(PlannedTrajectory(path, name, domain, trajectory, _request(config, domain, trajectory)))
    return jobs


def _request(config: DataConfig, domain: Domain, trajectory: int) -> dict[str, Any]:
    # Everything that a trajectory's bits depend on, which does not include the number of trajectories.
    return {
        "solver_version": SOLVER_VERSION,
        "name": config.name,
        "grid": list(config.grid),
        "snapshots": config.snapshots,
        "seed": config.seed,
        "trajectory": trajectory,
        "domain": domain.identity(),
    }


def is_done(job: PlannedTrajectory) -> bool:
    """Whether the file exists, is complete by its header, and was made by the same request."""
    if not job.path.exists():
        return False
    try:
        return read_provenance(job.path).get("request") == job.request
    except UserError:
        # A damaged file is regenerated.
        return False


def unfinished(
    config: DataConfig, folder: Path, part: int = 0, of: int = 1, begin: bool = True
) -> list[PlannedTrajectory]:
    """List missing or damaged trajectories in part ``part`` (from 0) of ``of`` equal parts of the dataset.

    Args:
        begin: also prepare for generation: remove leftovers of killed runs and require enough disk space.

    Raises:
        UserError: the config names no domain, the folder holds other data, or the missing trajectories of all parts
            do not fit on the disk.
    """
    jobs = planned_trajectories(config, folder)
    if not jobs:
        raise UserError("data.domains names no domain: keep at least one")
    _require_same_fields(config)
    _require_no_others(folder, {job.path for job in jobs})
    left = missing(jobs)
    if begin:
        for split in SPLITS:
            remove_leftovers(folder / "data" / split)
        require_space(folder, len(left), config)
    # Domains are interleaved, so contiguous parts of the list are about equal work.
    mine = {job.path for job in jobs[part * len(jobs) // of : (part + 1) * len(jobs) // of]}
    return [job for job in left if job.path in mine]


def missing(jobs: list[PlannedTrajectory]) -> list[PlannedTrajectory]:
    """List the jobs whose file does not exist or is incomplete."""
    for folder in {job.path.parent for job in jobs}:
        with suppress(OSError):
            os.listdir(folder)  # refreshes a network disk's cache, which may still say that a file is absent
    return [job for job in jobs if not is_done(job)]


def _require_no_others(folder: Path, wanted: set[Path]) -> None:
    others = [
        path for split in SPLITS for path in sorted((folder / "data" / split).glob("*.h*5")) if path.name[0] != "."
    ]
    others = [path for path in others if path not in wanted]
    if others:
        raise UserError(
            f"{folder} holds {len(others)} files that this config does not ask for ({others[0].name}, ...): "
            "remove them or set another data.name"
        )


def _require_same_fields(config: DataConfig) -> None:
    """Raise `UserError` if only some domains have a scalar: the_well's loader and the statistics need the same fields
    in every file of a folder.
    """
    scalar = {name: domain.scalar is not None for name, domain in config.domains.items()}
    if len(set(scalar.values())) > 1:
        without = next(name for name, has_scalar in scalar.items() if not has_scalar)
        raise UserError(
            f"data.domains.{without}.scalar is null while other domains have one: give every domain a scalar, "
            "or none of them, as all files of a dataset need the same fields"
        )


def require_space(folder: Path, count: int, config: DataConfig) -> None:
    """Raise `UserError` if ``count`` trajectories do not fit on the disk."""
    needed, free = needed_bytes(count, config), free_bytes(folder)
    if count and needed > free:
        raise UserError(
            f"{count} trajectories need {needed / 1e9:.2f} GB but {existing_parent(folder)} has {free / 1e9:.2f} GB "
            "free: choose another data.root, or fewer trajectories, snapshots or grid cells"
        )
