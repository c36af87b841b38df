"""Reading slices of an input in order, into given memory, hashing its files on the way."""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.merging.hashing import FileHash
from shodh_moe.merging.inputs import InputModel


class InputReader:
    """An input opened for one merge. Used by one thread at a time.

    Args:
        source: the input.
        order: names of the tensors, as they will be read.
    """

    def __init__(self, source: InputModel, order: list[str]):
        self.source = source
        self._descriptors = [os.open(file, os.O_RDONLY) for file in source.files]
        self._sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self._hashes: list[FileHash] = []
        if not source.sha256:
            last = [0] * len(source.files)
            ascending = [True] * len(source.files)
            for name in order:
                for extent in source.tensors[name].extents:
                    ascending[extent.file] &= extent.offset >= last[extent.file]
                    last[extent.file] = extent.offset
            self._hashes = [FileHash(one, up) for one, up in zip(self._descriptors, ascending, strict=True)]

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` (bytes) with a tensor from its element ``start`` on.

        Raises:
            UserError: the file has become shorter, or the disk gives an error.
        """
        stored = self.source.tensors[name]
        item = stored.dtype.itemsize
        end = start + len(out) // item
        first = max(bisect_right(stored.extents, start, key=lambda extent: extent.start) - 1, 0)
        for extent in stored.extents[first:]:
            low, high = max(start, extent.start), min(end, extent.start + extent.length)
            if low >= high:
                break
            part = out[(low - start) * item : (high - start) * item]
            offset = extent.offset + (low - extent.start) * item
            self._fill(extent.file, offset, part)
            if self._hashes:
                self._hashes[extent.file].feed(offset, part)

    def _fill(self, file: int, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptors[file], [out[done:]], offset + done)
            except OSError as error:
                raise UserError(f"cannot read {self.source.files[file]}: {error.strerror}") from error
            if not count:
                raise UserError(
                    f"{self.source.files[file]} has become shorter while it was read: keep inputs as they are"
                )
            done += count

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file, by its name. What the stream has not passed is read now."""
        hashes = [one.finish() for one in self._hashes]
        found = hashes or [self.source.sha256[file.name] for file in self.source.files]
        records = zip(self.source.files, self._sizes, found, strict=True)
        return {file.name: {"bytes": size, "sha256": digest} for file, size, digest in records}

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
