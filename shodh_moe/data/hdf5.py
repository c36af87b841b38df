"""New HDF5 files whose failing writes are exceptions, and not a crash at the end of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py


class _Sink:
    """A file for HDF5's writes that remembers the first failure instead of reporting it.

    HDF5 (seen with 1.14) cannot close a file that it could not write: it prints, tries again when the process
    ends, and crashes there. So it never hears of a full disk; what follows the failure is dropped.
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
    """A new file, on the disk when the block ends well.

    Raises:
        OSError: it could not be written. What is there then is worthless, and its owner removes it.
    """
    sink = _Sink(path)
    try:
        with h5py.File(sink, "w") as file:
            yield file
    except Exception:
        # Reading back what was dropped may fail inside HDF5; the disk is the reason.
        if sink.error:
            raise sink.error from None
        raise
    finally:
        sink.close()
    if sink.error:
        raise sink.error
