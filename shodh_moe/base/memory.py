"""The C library's allocator: what it keeps and gives back."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Parameter numbers of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Keep freed memory in the process instead of handing it back to the system after every layer.

    A training step frees and takes the same large tensors again and again; by default glibc maps and unmaps
    each, and zeroing fresh pages took a third of the tokenizer's step. Does nothing outside glibc.
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
    """Hand what is freed, and kept by `keep_freed_memory`, back to the system. Does nothing outside glibc."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
