"""Large remote files of which only the parts that are read are transferred, such as the HDF5 files of a dataset.

A pointer, a small local text file, stands for a remote file. What opens files by `openable` reads through it; anything
else finds a text that is not HDF5, and can take nothing in it for data. The blocks that were read are in the cache, in
a sparse file, so that no block is transferred twice, also by other processes.
"""

from __future__ import annotations

import errno
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble, write_text
from shodh_moe.base.hub import downloaded, hub_address
from shodh_moe.base.lock import making
from shodh_moe.base.remote import cache_folder, is_url, key_of, list_versions, local_copy, read_range, tells_version

MARK = "shodh_moe: pointer to a remote file\n"
READ_IN_PARTS = (".hdf5", ".h5")
BLOCK = 1 << 16  # bytes that are kept together; neighbouring blocks are transferred in one request


def mirror(url: str) -> Path:
    """Return a folder in the cache for a remote one: pointers to its HDF5 files, and copies of all others.

    Raises:
        UserError: there is no folder at the URL, or it cannot be reached.
    """
    folder = cache_folder() / "folders" / key_of(url)
    versions = list_versions(url)
    if not versions:
        raise UserError(f"{url} does not exist, or is empty: check the address")
    with making(folder, "download", run=""):
        for name, version in versions.items():
            path, text = folder / name, MARK + json.dumps({"url": f"{url.rstrip('/')}/{name}", **version}, indent=1)
            if not name.endswith(READ_IN_PARTS):
                text = ""
                copy = local_copy(f"{url.rstrip('/')}/{name}")
                if not path.exists() or path.read_bytes() != copy.read_bytes():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(copy.read_bytes())
            elif not tells_version(version):
                raise UserError(f"the server of {url} tells no versions of its files: copy the dataset")
            elif not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_text(path, text)
        for path in [one for one in folder.rglob("*") if one.is_file()]:
            if str(path.relative_to(folder)) not in versions:
                path.unlink()
    return folder


def local_folder(place: Path | str) -> Path:
    """Return a local path, in which ``~`` may stand for the home folder, as it is; for a URL, a local copy.

    A model of the model hub is in the hub's own cache; any other folder is a `mirror`.
    """
    if isinstance(place, str) and (found := hub_address(place)):
        return downloaded(found)
    return mirror(place) if isinstance(place, str) and is_url(place) else Path(place).expanduser()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the file that a pointer stands for."""
    found = pointed_at(path)
    return path.stat().st_size if found is None else int(found["bytes"])


def pointed_at(path: Path) -> dict[str, Any] | None:
    """Return what a pointer says: ``url``, ``bytes``, and what tells the version; None if the file is no pointer."""
    with open(path, "rb") as file:
        if file.read(len(MARK)) != MARK.encode():
            return None
        try:
            found = json.loads(file.read())
            return found if isinstance(found["url"], str) and isinstance(found["bytes"], int) else None
        except (ValueError, KeyError, TypeError):
            return None


def openable(path: Path) -> Path | RemoteFile:
    """Return a `RemoteFile` for a pointer, else ``path``: what ``h5py.File(..., "r")`` takes."""
    found = pointed_at(path)
    return path if found is None else RemoteFile(found)


class RemoteFile(io.RawIOBase):
    """A remote file, open for reading.

    Attributes:
        error: the first error of a transfer; HDF5 reports only that a read failed.
    """

    def __init__(self, found: dict[str, Any]):
        self._found, self._size = found, int(found["bytes"])
        self.error: UserError | None = None
        name = cache_folder() / "blocks" / key_of(json.dumps([BLOCK, found], sort_keys=True))
        name.parent.mkdir(parents=True, exist_ok=True)
        count = -(-self._size // BLOCK)
        self._at = 0
        self._data = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        self._there = os.open(name.with_suffix(".there"), os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(self._data).st_size != self._size:  # it is new, or was removed
            os.ftruncate(self._there, 0)
            os.ftruncate(self._data, self._size)
        os.ftruncate(self._there, count)  # a byte for each block, 1 once it is in the file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if not out:
            return 0
        try:
            self._fetch(self._at, self._at + len(out))
            done = 0
            while done < len(out):  # h5py does not notice a short read
                count = os.preadv(self._data, [out[done:]], self._at + done)
                if not count:
                    raise OSError(errno.EIO, "the cached file was cut")
                done += count
        except UserError as error:
            self.error = self.error or error
            raise
        except OSError as error:
            reason = disk_trouble(error) or error.strerror
            self.error = UserError(f"cannot keep {self._found['url']} in {cache_folder()}: {reason}")
            raise self.error from error
        self._at += done
        return done

    def _fetch(self, start: int, end: int) -> None:
        """Transfer the blocks of a range of bytes that are not there, each run of neighbours at once."""
        first, stop = start // BLOCK, -(-end // BLOCK)
        there: NDArray[np.uint8] = np.frombuffer(os.pread(self._there, stop - first, first), np.uint8)
        edges = np.flatnonzero(np.diff(np.concatenate([[1], there, [1]]).astype(np.int8)))
        for low, high in edges.reshape(-1, 2) + first:
            offset = int(low) * BLOCK
            data = read_range(self._found, offset, min(int(high) * BLOCK, self._size))
            done = 0
            while done < len(data):
                done += os.pwrite(self._data, data[done:], offset + done)
            os.fdatasync(self._data)  # before the mark, which must never outlive the data
            os.pwrite(self._there, bytes([1]) * int(high - low), int(low))

    def close(self) -> None:
        if not self.closed:
            for descriptor in (self._data, self._there):
                with suppress(OSError):
                    os.close(descriptor)
        super().close()
