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
from shodh_moe.data.importing.order import number_key
from shodh_moe.data.importing.samples import sample_names
from shodh_moe.data.listing import SPLITS
from shodh_moe.data.reading import read_provenance


@dataclass(frozen=True)
class Item:
    """One trajectory to import.

    Attributes:
        path: the file to write.
        entries: input files, in one list for each entry (a file or a pattern) of the mapping that names them.
        sample: name of the trajectory if the files hold many; None if they hold one, or cannot be read.
        samples: number of trajectories in the files.
        snapshots: range [first, last + 1] of snapshots to import; None: all.
        request: JSON-like values that identify its content.
    """

    path: Path
    entries: list[list[Path]]
    sample: str | None
    samples: int
    snapshots: tuple[int, int] | None
    request: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return [path for entry in self.entries for path in entry]


def plan_items(mapping: Mapping, folder: Path) -> list[Item]:
    """List every trajectory that the mapping names.

    Raises:
        UserError: no file matches a pattern, or two splits would get the same snapshots.
    """
    items = []
    taken: dict[tuple[tuple[Path, ...], str | None], list[tuple[str, tuple[int, int] | None]]] = {}
    for split in SPLITS:
        groups = [group for entry in getattr(mapping.files, split) for group in _groups(entry, f"files.{split}")]
        given = getattr(mapping.snapshots, split)
        cut = (given[0], given[1]) if given else None
        for index, (entries, sample, samples) in enumerate(_trajectories(groups, mapping, split)):
            paths = [path for entry in entries for path in entry]
            key = (tuple(paths), sample)
            for other, range_ in taken.setdefault(key, []):
                if cut is None or range_ is None or max(cut[0], range_[0]) < min(cut[1], range_[1]):
                    raise UserError(
                        f"{paths[0]} is in {other} and in {split}: give each split files of its own, or parts of the "
                        "time with `snapshots`" + (", or trajectories with `samples`" if mapping.many else "")
                    )
            taken[key].append((split, cut))
            states = [_state(path) for path in paths]
            # Store a hash, as HDF5 attributes are limited to 64 KB.
            request = {
                "mapping": mapping.request,
                "files": fingerprint(states),
                "snapshots": list(cut) if cut else None,
            }
            if sample is not None:
                request["sample"] = sample
            path = folder / "data" / split / f"{mapping.domain}_{index:04d}.hdf5"
            items.append(Item(path, entries, sample, samples, cut, request))
    return items


def _trajectories(
    groups: list[list[list[Path]]], mapping: Mapping, split: str
) -> Iterator[tuple[list[list[Path]], str | None, int]]:
    """Yield files, name and number of samples of each trajectory of a split.

    A file that cannot be read counts as one trajectory, whose import will fail.
    """
    first, stop = getattr(mapping.samples, split) or (0, None)
    for entries in groups:
        names: list[str] = []
        if mapping.many:
            with suppress(UserError):
                names = sample_names(mapping, entries)
        if not names:
            yield entries, None, 1
        elif stop is not None and stop > len(names):
            raise UserError(f"samples.{split} ends at {stop}, but {entries[0][0]} holds {len(names)} trajectories")
        else:
            yield from ((entries, name, len(names)) for name in names[first:stop])


def _state(path: Path) -> list[Any]:
    """Name, size and time of a file; of a folder, such as .zarr or an OpenFOAM case, those of all files in it."""
    if path.is_dir():
        inner = [_state(one) for one in sorted(path.rglob("*")) if one.is_file()]
        return [str(path), len(inner), fingerprint(inner)]
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def is_done(item: Item) -> bool:
    """Whether the file exists, is complete, and was made by the same request."""
    with suppress(UserError):
        return item.path.exists() and read_provenance(item.path).get("request") == item.request
    return False


def _groups(entry: str | list[str], key: str) -> list[list[list[Path]]]:
    """Return the files of each trajectory of an entry: one file each for a pattern, the files of all for a list."""
    patterns = [entry] if isinstance(entry, str) else entry
    found = []
    for pattern in patterns:
        paths = [Path(one) for one in sorted(sorted(glob(pattern, recursive=True)), key=number_key)]
        if not paths:
            raise UserError(
                f"{key}: no file matches {pattern!r}: paths are relative to the folder in which you run the command"
            )
        found.append(paths)
    every = [path for paths in found for path in paths]
    if len(set(every)) < len(every):
        twice = next(path for path in every if every.count(path) > 1)
        raise UserError(f"{key}: one list names {twice} twice: name every file of a trajectory once")
    return [[[path]] for path in every] if isinstance(entry, str) else [found]


def require_no_others(folder: Path, domain: str, wanted: set[Path]) -> None:
    """Raise `UserError` if the folder has trajectories of this domain that the mapping would not replace."""
    found = [path for split in SPLITS for path in sorted((folder / "data" / split).glob(f"{domain}_[0-9]*.hdf5"))]
    others = [path for path in found if path not in wanted]
    if others:
        raise UserError(
            f"{folder} holds {len(others)} trajectories of {domain} that this mapping does not name "
            f"({others[0].name}, ...): remove them, or set another domain or output"
        )
