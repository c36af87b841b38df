"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Parameter numbers of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process instead of returning it to the system after every layer.

    A training step allocates and frees the same large tensors again and again. By default glibc maps and unmaps each
    of them, and zeroing new pages took a third of the tokenizer's step. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 << 20)


def give_back_freed_memory() -> None:
    """Return to the system the freed memory that `keep_freed_memory` retained. Does nothing without glibc."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
