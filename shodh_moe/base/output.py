"""Standard output and standard error whose reader may go away: ``head`` behind a pipe ends, a terminal is closed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from shodh_moe.base.errors import EXIT_UNREAD


class ReaderGone(SystemExit):
    """Whoever read this process's standard output has ended, so no more output is wanted."""

    def __init__(self) -> None:
        super().__init__(EXIT_UNREAD)


@contextmanager
def guarded_output(goes_on: bool = False) -> Iterator[None]:
    """Within the block, output that nobody can read any more raises no OSError.

    Output to a closed terminal is discarded, as is standard error: SIGHUP says whether the process should end. If the
    reader of a pipe has ended, standard output raises `ReaderGone`, or is discarded too if the process ``goes_on``.
    """
    before = sys.stdout, sys.stderr
    output, error = _Guarded(sys.stdout, ends=not goes_on), _Guarded(sys.stderr, ends=False)
    sys.stdout, sys.stderr = output, error  # type: ignore[assignment]
    try:
        yield
    finally:
        try:
            for stream in (error, output):
                with suppress(OSError):
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before


class _Guarded:
    """A text stream; ``None``, which Python sets for a closed descriptor, is a stream without a reader."""

    def __init__(self, stream: TextIO | None, ends: bool):
        self._stream, self._ends = stream, ends
        self._terminal = bool(stream and not stream.closed and stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text) if self._stream else len(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            if self._stream and not self._stream.closed:
                self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Discard this and all further output, of which the interpreter may try to write some at its end.

        Raises:
            ReaderGone: the reader of a pipe has ended, and so does this process.
            OSError: anything else than a missing reader, such as a full disk.
        """
        assert self._stream
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._terminal and error.errno == errno.EIO:
            return
        if error.errno != errno.EPIPE:
            raise error
        if self._ends:
            raise ReaderGone from None
