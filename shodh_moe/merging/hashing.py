"""SHA-256 of a file whose bytes pass by anyway, so that it is not read twice."""

from __future__ import annotations

import hashlib
import os
from typing import Any

BLOCK = 4 << 20  # bytes read at a time where the stream left some out


class FileHash:
    """The hash of one file, fed with what is read from it or written to it.

    Bytes that come in ascending order are hashed as they come, gaps (headers, tensors that nobody asked for) are read
    from the file. Where the order is known not to be ascending, all is left to `finish`.
    """

    def __init__(self, descriptor: int, ascending: bool = True):
        self._descriptor = descriptor
        self._ascending = ascending
        self._digest = hashlib.sha256()
        self._done = 0  # bytes

    def feed(self, offset: int, data: Any) -> None:
        """``data`` (a buffer of bytes) lies at ``offset``; a second pass over the same bytes adds nothing."""
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
