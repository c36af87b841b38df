"""List the trajectories that a mapping asks for, their input files, and whether they have been imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.config.compare import fingerprint
from shodh_moe.data.importing.mapping import Mapping
from shodh_moe.data.importing.samples import sample_names
from shodh_moe.data.importing.snapshots import natural
from shodh_moe.data.listing import SPLITS
from shodh_moe.data.reading import read_provenance


@dataclass(frozen=True)
class Item:
    """One trajectory to import.

    Attributes:
        path: the file to write.
        files: input files.
        sample: name of the trajectory if the files hold many; None if they hold one, or cannot be read.
        samples: number of trajectories in the files.
        snapshots: range [first, last + 1] of snapshots to import; None: all.
        request: JSON-like values that identify its content.
    """

    path: Path
    files: list[Path]
    sample: str | None
    samples: int
    snapshots: tuple[int, int] | None
    request: dict[str, Any]


def plan_items(mapping: Mapping, folder: Path) -> list[Item]:
    """List every trajectory that the mapping names.

    Raises:
        UserError: no file matches a pattern, or two splits would get the same snapshots.
    """
    items = []
    taken: dict[tuple[Path | str, ...], list[tuple[str, tuple[int, int] | None]]] = {}
    for split in SPLITS:
        groups = [group for entry in getattr(mapping.files, split) for group in _groups(entry, f"files.{split}")]
        given = getattr(mapping.snapshots, split)
        cut = (given[0], given[1]) if given else None
        for index, (paths, sample, samples) in enumerate(_trajectories(groups, mapping, split)):
            key = (*paths, sample or "")
            for other, range_ in taken.setdefault(key, []):
                if cut is None or range_ is None or max(cut[0], range_[0]) < min(cut[1], range_[1]):
                    raise UserError(
                        f"{paths[0]} is in {other} and in {split}: give each split files of its own, or parts of the "
                        "time with `snapshots`" + (", or trajectories with `samples`" if mapping.many else "")
                    )
            taken[key].append((split, cut))
            states = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
            # Store a hash, as HDF5 attributes are limited to 64 KB.
            request = {
                "mapping": mapping.request,
                "files": fingerprint(states),
                "snapshots": list(cut) if cut else None,
            }
            if sample is not None:
                request["sample"] = sample
            path = folder / "data" / split / f"{mapping.domain}_{index:04d}.hdf5"
            items.append(Item(path, paths, sample, samples, cut, request))
    return items


def _trajectories(
    groups: list[list[Path]], mapping: Mapping, split: str
) -> Iterator[tuple[list[Path], str | None, int]]:
    """Yield files, name and number of samples of each trajectory of a split.

    A file that cannot be read counts as one trajectory, whose import will fail.
    """
    first, stop = getattr(mapping.samples, split) or (0, None)
    for paths in groups:
        names: list[str] = []
        if mapping.many:
            with suppress(UserError):
                names = sample_names(mapping, paths)
        if not names:
            yield paths, None, 1
        elif stop is not None and stop > len(names):
            raise UserError(f"samples.{split} ends at {stop}, but {paths[0]} holds {len(names)} trajectories")
        else:
            yield from ((paths, name, len(names)) for name in names[first:stop])


def is_done(item: Item) -> bool:
    """Whether the file exists, is complete, and was made by the same request."""
    with suppress(UserError):
        return item.path.exists() and read_provenance(item.path).get("request") == item.request
    return False


def _groups(entry: str | list[str], key: str) -> list[list[Path]]:
    """Return the files of each trajectory of an entry: one file each for a pattern, all files for a list."""
    patterns = [entry] if isinstance(entry, str) else entry
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted((Path(one) for one in glob(pattern, recursive=True)), key=lambda one: natural(str(one)))
        if not found:
            raise UserError(
                f"{key}: no file matches {pattern!r}: paths are relative to the folder in which you run the command"
            )
        paths += found
    return [[path] for path in paths] if isinstance(entry, str) else [paths]


def require_no_others(folder: Path, domain: str, wanted: set[Path]) -> None:
    """Raise `UserError` if the folder has trajectories of this domain that the mapping would not replace."""
    found = [path for split in SPLITS for path in sorted((folder / "data" / split).glob(f"{domain}_[0-9]*.hdf5"))]
    others = [path for path in found if path not in wanted]
    if others:
        raise UserError(
            f"{folder} holds {len(others)} trajectories of {domain} that this mapping does not name "
            f"({others[0].name}, ...): remove them, or set another domain or output"
        )
