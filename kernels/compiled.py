"""Compilation of CPU kernels with numba, and how many threads they use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numba
import torch

# Fused multiply-adds and the like, but no other order of operations: the bits do not depend on vector widths.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "fastmath": {"contract", "nsz", "arcp"}}
# Numba's fallback threading layer, used where no OpenMP is installed, must not be entered twice.
_one_caller = threading.RLock()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile with numba, cached on disk where a writable cache folder exists (a read-only install may have none)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, **(_OPTIONS | options))(function)  # type: ignore[no-any-return]
        except RuntimeError:
            return numba.njit(**(_OPTIONS | options))(function)  # type: ignore[no-any-return]

    return decorate


@contextlib.contextmanager
def torch_threads() -> Iterator[int]:
    """Numba's parallel loops run on as many threads as torch uses, one caller at a time."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    with _one_caller:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            yield threads
        finally:
            numba.set_num_threads(before)
