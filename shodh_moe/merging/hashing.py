"""SHA-256 of a file while it is streamed, so that it need not be read twice."""

from __future__ import annotations

import hashlib
import os
from typing import Any

BLOCK = 4 << 20  # bytes read at a time to fill gaps in the stream


class FileHash:
    """The hash of one file, updated with the bytes that are read from it or written to it.

    Bytes in ascending order are hashed as they arrive; gaps (headers, unused tensors) are read from the file. If the
    order is not ascending, `finish` reads the whole file.
    """

    def __init__(self, descriptor: int, ascending: bool = True):
        self._descriptor = descriptor
        self._ascending = ascending
        self._digest = hashlib.sha256()
        self._done = 0  # bytes

    def feed(self, offset: int, data: Any) -> None:
        """Add ``data``, a buffer of the bytes at ``offset``; bytes that were hashed before are ignored."""
        if not self._ascending or offset + len(data) <= self._done:
            return
        self._read_to(offset)
        self._digest.update(data[self._done - offset :])
        self._done = offset + len(data)

    def finish(self) -> str:
        """Hex SHA-256 of the whole file."""
        self._read_to(os.fstat(self._descriptor).st_size)
        return self._digest.hexdigest()

    def _read_to(self, end: int) -> None:
        while self._done < end:
            block = os.pread(self._descriptor, min(BLOCK, end - self._done), self._done)
            if not block:
                return
            self._digest.update(block)
            self._done += len(block)
