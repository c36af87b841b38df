"""Choose whether a call runs the Triton kernel or the torch reference, and launch Triton kernels.

The environment variable ``SHODH_KERNELS`` decides: ``auto`` (default) uses Triton for tensors on a GPU and elsewhere
the reference, with compiled passes where they are faster; ``reference`` always uses the reference; ``triton`` always
uses Triton, which on the CPU needs its interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
# Block sizes measured on real devices: {device name: {kernel: {size class: {setting: value}}}}.
TUNED = Path(__file__).with_name("tuned.json")


def _choice() -> str:
    choice = os.environ.get("SHODH_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"SHODH_KERNELS is {choice!r}: set it to one of {', '.join(CHOICES)}")
    return choice


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether a call on ``tensor`` runs the Triton kernel.

    Raises:
        ValueError: ``SHODH_KERNELS`` has an unknown value.
        RuntimeError: Triton is requested where it cannot run.
    """
    if _recorded is not None:
        return True
    choice = _choice()
    if choice == "auto":
        return tensor.is_cuda and _has_triton()
    if choice == "triton" and not _has_triton():
        raise RuntimeError("SHODH_KERNELS=triton, but triton is not installed: pip install 'shodh_moe[triton]'")
    if choice == "triton" and not (tensor.is_cuda or _interpreting()):
        raise RuntimeError(
            f"SHODH_KERNELS=triton, but the tensors are on {tensor.device}: "
            "move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    return choice == "triton"


def use_reference() -> bool:
    """Whether ``SHODH_KERNELS`` requests the torch reference rather than the best form for the device."""
    return _choice() == "reference"


def describe(device: torch.device) -> str:
    """Say in one line for the log which kernels run on ``device``, and why. Raises the errors of `use_triton`."""
    choice = _choice()
    why = "" if choice == "auto" else f" (SHODH_KERNELS={choice})"
    if use_triton(torch.empty(0, device=device)):
        return f"triton {version('triton')}{', interpreted' if _interpreting() else ''}{why}"
    if device.type == "cuda" and choice == "auto":
        why = " (triton is not installed)"
    if device.type == "cpu" and choice == "auto":
        return "compiled CPU passes, torch reference"
    return f"torch reference{why}"


def exact(tensor: Tensor) -> torch.autocast:
    """A context without autocast, in which the operands of matrix products keep their dtype."""
    return torch.autocast(tensor.device.type, enabled=False)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a Triton product accumulated in ``dtype``. AMD's compiler does not support tf32x3."""
    return "ieee" if dtype == torch.float64 or torch.version.hip else "tf32x3"


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any  # the @triton.jit function
    args: tuple[Any, ...]
    meta: dict[str, Any]  # constexpr arguments and num_warps, num_stages


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the block, record launches instead of running them, to compile them with `kernels.ahead_of_time`.

    Every operation uses its Triton form there; pass it tensors on the ``meta`` device.
    """
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def recording() -> bool:
    """Whether launches are being recorded instead of run, so that results cannot be read."""
    return _recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run ``kernel[grid](*args, **meta)`` on the device of its first tensor. An empty grid runs nothing."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, meta))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **meta)


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


@lru_cache(maxsize=8)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def settings(kernel: str, size_class: str, default: dict[str, int], device: torch.device) -> dict[str, int]:
    """Block sizes and warps for a launch: ``default``, updated with those tuned on this device (benchmarks/tune.py)."""
    return default | _table().get(_device_name(device), {}).get(kernel, {}).get(size_class, {})
