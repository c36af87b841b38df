"""Compilation of CPU kernels with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Fused multiply-adds and the like, but no other order of operations: the bits do not depend on vector widths.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "fastmath": {"contract", "nsz", "arcp"}}


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile with numba, cached on disk where a writable cache folder exists (a read-only install may have none)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, **_OPTIONS, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:
            return numba.njit(**_OPTIONS, **options)(function)  # type: ignore[no-any-return]

    return decorate
