"""List the splits, trajectories and domains of a dataset folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable
from shodh_moe.data.reading import TrajectoryRecord, open_trajectories, read_snapshots

SPLITS = ("train", "valid", "test")
READ_BYTES = 4 * 2**30
TrajectoryKey = tuple[str, int]  # name of a data file, and index of the trajectory in it
_read: set[tuple[object, ...]] = set()


def list_trajectories(
    folder: Path | str, split: str, grid: Sequence[int] | None = None, skip_bad: bool = False
) -> list[TrajectoryRecord]:
    """List the trajectories under ``<folder>/data/<split>`` in the order of their file names.

    Args:
        grid: required grid; None: the grid of the first file.
        skip_bad: skip bad files, and print which and why on stderr. Files with bad values are skipped too if the split
            has at most ``READ_BYTES``; in larger splits, reading such a file raises an error later.

    Raises:
        UserError: the folder is missing or has no HDF5 file, a file is unreadable or lies outside the folder, or the
            grids differ; with ``skip_bad``: no file is left.
    """
    root = Path(folder) / "data" / split
    if split not in SPLITS:
        raise UserError(f"no split named {split!r}: choose one of {', '.join(SPLITS)}")
    paths = _hdf5_files(root)
    if not paths:
        raise UserError(f"no HDF5 files in {root}: generate the data first, or check data.path")
    records: dict[Path, list[TrajectoryRecord]] = {}
    bad: dict[Path, str] = {}
    wanted = tuple(grid) if grid is not None else None
    for path in paths:
        try:
            records[path] = open_file(path, Path(folder), wanted)
            wanted = records[path][0].grid
        except UserError as error:
            if not skip_bad:
                raise
            bad[path] = str(error)
    if skip_bad and sum(record.nbytes for found in records.values() for record in found) <= READ_BYTES:
        bad |= {path: why for path, found in records.items() if (why := _bad_values(found))}
    for path, why in sorted(bad.items()):
        print(printable(f"left out {path.relative_to(folder)}: {why}"), file=sys.stderr, flush=True)
    left = [record for path, found in records.items() if path not in bad for record in found]
    if not left:
        raise UserError(f"none of the {len(paths)} files in {root} can be used: see the lines above")
    return left


def trajectories_by_source(
    folder: Path | str, split: str, grid: Sequence[int] | None = None, skip_bad: bool = False
) -> dict[TrajectoryKey, TrajectoryRecord]:
    """`list_trajectories` by the file name and index that latents store of the trajectory that they were made from."""
    return {(one.path.name, one.sample): one for one in list_trajectories(folder, split, grid, skip_bad)}


def files_of(path: Path) -> dict[str, list[Path]]:
    """List the HDF5 files of each split of a dataset's folder; a single file forms a split with an empty name.

    Raises:
        UserError: there is no HDF5 file.
    """
    if path.is_file():
        return {"": [path]}
    found = {split: _hdf5_files(path / "data" / split) for split in SPLITS}
    if not any(found.values()):
        raise UserError(f"no HDF5 files in {path}/data/train, valid or test: give a dataset's folder, or one file")
    return found


def open_file(path: Path, dataset: Path, grid: tuple[int, ...] | None = None) -> list[TrajectoryRecord]:
    """List the trajectories of one of the files of `files_of`; every command reads a dataset's files through here.

    Args:
        dataset: the dataset's folder, or ``path`` itself for a single file.

    Raises:
        UserError: as in `open_trajectories`, or the file is a link that leads out of the folder.
    """
    require_inside(path, dataset)
    return open_trajectories(path, grid)


def _hdf5_files(root: Path) -> list[Path]:
    # A leading dot marks an unfinished file.
    return sorted(p for ending in ("*.hdf5", "*.h5") for p in root.glob(ending) if not p.name.startswith("."))


def require_inside(path: Path, folder: Path) -> None:
    """Raise `UserError` if ``path`` is a link that leads out of ``folder``."""
    target = Path(os.path.realpath(path))  # unlike Path.resolve, it accepts a link to itself
    if not target.is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{path} is a symbolic link to {target}, outside {folder}: copy the file itself into the folder"
        )


def _bad_values(records: Sequence[TrajectoryRecord]) -> str:
    """Return the reason why a file's values cannot be used, or "". Each file is read once per process."""
    try:
        for record in records:
            status = record.path.stat()
            key = (record, status.st_size, status.st_mtime_ns)
            if key not in _read:
                read_snapshots(record)
                _read.add(key)
    except UserError as error:
        return str(error)
    return ""


def domain_names(records: Sequence[TrajectoryRecord]) -> list[str]:
    """List the domains of ``records`` in alphabetical order; a domain's position is its index."""
    return sorted({record.domain for record in records})
