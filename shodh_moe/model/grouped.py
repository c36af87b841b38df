"""Products of rows, sorted by expert, with their expert's matrix.

Shapes: R rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def has_grouped_kernel(x_RI: Tensor, *weights_EIO: Tensor) -> bool:
    """Whether torch's grouped product (since 2.10) has a GPU kernel: bfloat16 rows that are multiples of 16 bytes."""
    fits = all(size % 8 == 0 for weight in weights_EIO for size in weight.shape[1:])
    return x_RI.is_cuda and x_RI.dtype == torch.bfloat16 and fits and hasattr(F, "grouped_mm")


def grouped_linear(x_RI: Tensor, weight_EIO: Tensor, count_E: Tensor, counts: list[int] | None = None) -> Tensor:
    """Outputs [R, O] for rows sorted by expert: the first ``count_E[0]`` belong to expert 0, and so on.

    Args:
        counts: ``count_E`` as a list, if the caller has it. Where there is no kernel, reading it waits for the device.
    """
    if has_grouped_kernel(x_RI, weight_EIO):
        return F.grouped_mm(x_RI, weight_EIO, offs=count_E.cumsum(0, dtype=torch.int32))
    parts = x_RI.split(count_E.tolist() if counts is None else counts)
    return torch.cat([part @ weight for part, weight in zip(parts, weight_EIO.unbind(), strict=True)])
