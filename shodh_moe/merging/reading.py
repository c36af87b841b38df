"""Read slices of an input in order into given buffers, and hash its files along the way."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from typing import Any

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.merging.hashing import FileHash
from shodh_moe.merging.inputs import InputModel, Stored


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
        if stored.strides is not None:
            self._gather(stored, start, out)
            return
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

    def _gather(self, stored: Stored, start: int, out: memoryview) -> None:
        """Like `read`, for a tensor whose elements are not in order. Its file is mapped, and hashed later."""
        assert stored.strides is not None
        (extent,), item = stored.extents, stored.dtype.itemsize
        try:
            mapped = np.memmap(self.model.files[extent.file], np.uint8, "r")
            strides = [stride * item for stride in stored.strides]
            view: Any = np.ndarray(stored.shape, f"V{item}", mapped, extent.offset, strides)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {self.model.files[extent.file]}: {error}") from error
        _copy_range(view, start, np.frombuffer(out, f"V{item}"))

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


def _copy_range(view: Any, start: int, out: Any) -> None:
    """Fill the 1-D array ``out`` with the elements of ``view`` from number ``start`` on, in row-major order."""
    if view.ndim <= 1:
        out[...] = view.reshape(-1)[start : start + len(out)]
        return
    row, done = math.prod(view.shape[1:]), 0
    while done < len(out):
        index, within = divmod(start + done, row)
        count = min(row - within, len(out) - done)
        if count == row:
            rows = (len(out) - done) // row
            count = rows * row
            out[done : done + count].reshape(rows, *view.shape[1:])[...] = view[index : index + rows]
        else:
            _copy_range(view[index], within, out[done : done + count])
        done += count
