"""Identify an existing dataset by the content of its files, whatever their times and wherever the folder lies.

Hashing reads every byte once. The hashes are remembered in a file beside the tokenizers, with the size and time of each
file, so that later commands and ranks only hash files whose size or time has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble, sha256, write_text
from shodh_moe.base.progress import progress
from shodh_moe.config.compare import fingerprint

HASHED_AT_ONCE = 8  # files
SHOW_BYTES = 4 * 2**30  # hashing at least this much shows its progress
_Key = tuple[str, int, int]  # absolute path, bytes, modification time in ns
Listing = dict[Path, _Key]
_hashes: dict[_Key, str] = {}
_listings: dict[Path, Listing] = {}  # of each dataset that this process has identified


def list_dataset(dataset: Path) -> Listing:
    """List the files that belong to a dataset, those of its splits and its statistics, by path, with size and time."""
    found = [*dataset.glob("data/*/*"), dataset / "stats.yaml"]
    paths = sorted(path for path in found if path.is_file() and path.name[0] != ".")
    return {path: (str(path.absolute()), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths}


def content_of(dataset: Path, listing: Listing, root: Path) -> str:
    """Return the identity of a dataset's content: eight hexadecimal digits.

    Args:
        dataset: folder of the dataset.
        listing: its files, from `list_dataset`.
        root: folder in which `remember_content` keeps the hashes, which may not exist.

    Raises:
        UserError: a file cannot be read.
    """
    if any(key not in _hashes for key in listing.values()):
        _hashes.update(_read(_memory(dataset, root)))
    new = {key: path for path, key in listing.items() if key not in _hashes}
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        found: Iterable[str] = pool.map(_hash, new.values())
        if sum(size for _, size, _ in new) >= SHOW_BYTES:
            found = progress(found, "identify the data", len(new))
        _hashes.update(zip(new, found, strict=True))
    _listings[dataset] = listing
    return fingerprint([(str(path.relative_to(dataset)), _hashes[key]) for path, key in listing.items()])


def remember_content(dataset: Path, root: Path) -> None:
    """Keep the hashes that `content_of` has computed in this process, if any, for later ones.

    Raises:
        UserError: the file cannot be written.
    """
    known = {key: _hashes[key] for key in _listings.get(dataset, {}).values()}
    if known and _read(_memory(dataset, root)) != known:
        write_text(_memory(dataset, root), json.dumps([[*key, digest] for key, digest in known.items()]) + "\n")


def times_of(dataset: Path, listing: Listing) -> str:
    """Return the identity that earlier versions gave a dataset, from the sizes and times of its files."""
    return fingerprint([(str(path.relative_to(dataset)), size, time) for path, (_, size, time) in listing.items()])


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {disk_trouble(error) or error.strerror}") from error


def _memory(dataset: Path, root: Path) -> Path:
    return root / ".data" / f"{fingerprint(str(dataset.absolute()))}.json"


def _read(memory: Path) -> dict[_Key, str]:
    try:
        return {(str(p), int(size), int(time)): str(digest) for p, size, time, digest in json.loads(memory.read_text())}
    except (OSError, ValueError, TypeError):
        return {}  # it only saves time
