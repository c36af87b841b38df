"""Compilation of CPU kernels with numba."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import torch

# Allow fused multiply-adds and similar changes but no reordering, so that results do not depend on vector widths.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "fastmath": {"contract", "nsz", "arcp"}}
# Numba's fallback threading layer, used without OpenMP, is not reentrant.
_one_caller = threading.Lock()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile with numba, cached on disk if there is a writable cache folder (a read-only install may have none)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, **(_OPTIONS | options))(function)  # type: ignore[no-any-return]
        except RuntimeError:
            return numba.njit(**(_OPTIONS | options))(function)  # type: ignore[no-any-return]

    return decorate


def parallel_loops(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function whose ``numba.prange`` loops run on as many threads as torch uses.

    If torch uses one thread, a serial version runs: numba would start all its threads even then, and idle threads spin,
    which slows down other ranks on the machine.
    """
    # Numba names its cache files after the function but not its options, so the serial version needs another name.
    twin = FunctionType(function.__code__, function.__globals__, function.__name__)
    twin.__qualname__ = f"{function.__qualname__}_serial"
    serial, parallel = compiled()(twin), compiled(parallel=True)(function)

    def call(*arguments: Any) -> None:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1:
            serial(*arguments)
            return
        with _one_caller:
            before = numba.get_num_threads()
            numba.set_num_threads(threads)
            try:
                parallel(*arguments)
            finally:
                numba.set_num_threads(before)

    return call
