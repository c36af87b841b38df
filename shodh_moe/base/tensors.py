"""Tensors in safetensors files, their way to a device, and counts that do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the default permissions of a new file.

    The library (0.8) would make it readable only by its owner, but teams share models.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor from the CPU to a device without waiting for the device; a tensor that is there already stays.

    A copy from ordinary memory, or a blocking one, waits until the device has done all earlier work. This one starts
    from pinned memory.

    Args:
        dtype: of the result; None keeps the tensor's.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        # Converted first: a copy that converts makes a temporary tensor in ordinary memory.
        tensor = tensor.to(dtype or tensor.dtype).pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def sent_numbers(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Make a 1-D tensor of numbers on a device, without waiting for it; ``dtype`` as in `torch.tensor`."""
    return sent(torch.tensor(numbers, dtype=dtype), device)


def count_classes(class_N: Tensor, classes: int) -> Tensor:
    """Count the entries of each class, int64 [classes], without waiting for the device.

    `torch.bincount` waits, because the size of its result depends on the values.

    Args:
        class_N: integers from 0 to ``classes - 1``, of any shape.
    """
    class_N = class_N.flatten()
    if class_N.device.type == "cpu":
        return torch.bincount(class_N, minlength=classes)
    return (class_N[:, None] == torch.arange(classes, device=class_N.device)).sum(0)
