"""Write new HDF5 files such that a failed write raises an exception instead of crashing the process at exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py


class _Sink:
    """A file object for HDF5 that records the first write error instead of reporting it.

    HDF5 (seen with 1.14) cannot close a file after a failed write: it prints messages, tries again when the process
    ends, and crashes. So this class hides errors from it and drops all writes after the first error.
    """

    def __init__(self, path: Path):
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by `new_hdf5`
        self.error: OSError | None = None
        self.name = str(path)
        self.read, self.readinto = self._file.read, self._file.readinto
        self.seek, self.tell = self._file.seek, self._file.tell
        self.flush, self.close = self._file.flush, self._file.close

    def write(self, data: memoryview) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and not self.error:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int) -> int:
        try:
            return size if self.error else self._file.truncate(size)
        except OSError as error:
            self.error = error
            return size


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """Create an HDF5 file, which is complete if the block succeeds.

    Raises:
        OSError: the file could not be written. The caller must remove the incomplete file.
    """
    sink = _Sink(path)
    try:
        with h5py.File(sink, "w") as file:
            yield file
    except Exception:
        # HDF5 may fail to read data that was dropped; the write error is the actual cause.
        if sink.error:
            raise sink.error from None
        raise
    finally:
        sink.close()
    if sink.error:
        raise sink.error
