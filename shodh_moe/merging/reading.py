"""Read slices of an input in order into given buffers, and hash its files along the way."""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.merging.hashing import FileHash
from shodh_moe.merging.inputs import InputModel


class InputReader:
    """An input opened for one merge. Not thread-safe.

    Args:
        model: the input.
        order: names of the tensors in the order of reading.
    """

    def __init__(self, model: InputModel, order: list[str]):
        self.model = model
        self._descriptors = [os.open(file, os.O_RDONLY) for file in model.files]
        self._sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self._hashes: list[FileHash] = []
        if not model.sha256:
            last = [0] * len(model.files)
            ascending = [True] * len(model.files)
            for name in order:
                for extent in model.tensors[name].extents:
                    ascending[extent.file] &= extent.offset >= last[extent.file]
                    last[extent.file] = extent.offset
            self._hashes = [FileHash(one, up) for one, up in zip(self._descriptors, ascending, strict=True)]

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` (bytes) with elements of a tensor from ``start`` on.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        stored = self.model.tensors[name]
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
                raise UserError(f"cannot read {self.model.files[file]}: {error.strerror}") from error
            if not count:
                raise UserError(
                    f"{self.model.files[file]} became shorter while it was read: do not change inputs during a merge"
                )
            done += count

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file by name; reads the parts that were not streamed."""
        hashes = [one.finish() for one in self._hashes]
        found = hashes or [self.model.sha256[file.name] for file in self.model.files]
        records = zip(self.model.files, self._sizes, found, strict=True)
        return {file.name: {"bytes": size, "sha256": digest} for file, size, digest in records}

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
