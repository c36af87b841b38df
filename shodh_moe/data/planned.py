"""The trajectories of a generated dataset as work items, each of its own: which are wanted, and which still missing."""

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
    """One trajectory to be made: which one, where it goes and the request that identifies it."""

    path: Path
    domain: str
    config: Domain
    trajectory: int
    request: dict[str, Any]


def plan(config: DataConfig, folder: Path) -> list[PlannedTrajectory]:
    """Every trajectory that ``config`` asks for, domains interleaved."""
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
    # All that the bits of a trajectory depend on; how many others there are is not part of it.
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
    """Whether the file is there, whole by its header, and made by the same request."""
    if not job.path.exists():
        return False
    try:
        return read_provenance(job.path).get("request") == job.request
    except UserError:
        # Damaged: make it again.
        return False


def unfinished(
    config: DataConfig, folder: Path, part: int = 0, of: int = 1, begin: bool = True
) -> list[PlannedTrajectory]:
    """What is missing or damaged in part ``part`` (from 0) of ``of`` equal parts of the dataset.

    ``begin``: it is about to be made, so leftovers of killed runs are removed and the disk must have the room.

    Raises:
        UserError: the config asks for nothing, the folder holds other data, or what all parts still lack does not fit
            on the disk.
    """
    jobs = plan(config, folder)
    if not jobs:
        raise UserError("data.domains names no domain: keep at least one")
    _require_same_fields(config)
    _require_no_others(folder, {job.path for job in jobs})
    left = missing(jobs)
    if begin:
        for split in SPLITS:
            remove_leftovers(folder / "data" / split)
        require_space(folder, len(left), config)
    # Neighbours in the list are of different domains: a run of them is as much work as any other.
    mine = {job.path for job in jobs[part * len(jobs) // of : (part + 1) * len(jobs) // of]}
    return [job for job in left if job.path in mine]


def missing(jobs: list[PlannedTrajectory]) -> list[PlannedTrajectory]:
    """Those whose file is not there or not whole."""
    for folder in {job.path.parent for job in jobs}:
        with suppress(OSError):
            os.listdir(folder)  # network disks remember for a while that a single name was not there
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
    """The loader of the_well wants the same fields in all files of a folder, and so do the statistics."""
    scalar = {name: domain.scalar is not None for name, domain in config.domains.items()}
    if len(set(scalar.values())) > 1:
        without = next(name for name, has_one in scalar.items() if not has_one)
        raise UserError(
            f"data.domains.{without}.scalar is null while other domains have one: give every domain a scalar, "
            "or none of them, as all files of a dataset need the same fields"
        )


def require_space(folder: Path, count: int, config: DataConfig) -> None:
    """Refuse to begin ``count`` trajectories that do not fit on the disk. Raises `UserError`."""
    needed, free = needed_bytes(count, config), free_bytes(folder)
    if count and needed > free:
        raise UserError(
            f"{count} trajectories need {needed / 1e9:.2f} GB but {existing_parent(folder)} has {free / 1e9:.2f} GB "
            "free: choose another data.root, or fewer trajectories, snapshots or grid cells"
        )
