"""Tell the network the time stride of each sample.

Shapes: B samples, S strides, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import mark
from shodh_moe.model.routers import Context


class StrideEmbedding(nn.Module):
    """A learned vector for each time stride, zero before training, to be added to all tokens of a sample.

    Args:
        strides: ``model.strides``.
        dim: D.
    """

    stride_S: Tensor

    def __init__(self, strides: Sequence[int], dim: int):
        super().__init__()
        self.register_buffer("stride_S", torch.tensor(strides), persistent=False)
        self.weight_SD = nn.Parameter(torch.zeros(len(strides), dim))
        mark(self.weight_SD, decay=False)

    def forward(self, context: Context) -> Tensor:
        """Return each sample's vector [B, D].

        Raises:
            UserError: outside training, if a sample has another stride.
        """
        if context.stride_B is None:
            return self.weight_SD[:1].expand(context.samples, -1)
        match_BS = context.stride_B[:, None] == self.stride_S
        if not self.training and not match_BS.any(1).all():
            require_stride(next(s for s in context.stride_B.tolist() if s not in self.stride_S), self.stride_S.tolist())
        return self.weight_SD[match_BS.int().argmax(1)]


def require_stride(stride: int, strides: Sequence[int]) -> None:
    """Raise `UserError` if a model with ``model.strides`` was not trained with a stride."""
    if stride not in strides:
        known = ", ".join(map(str, strides))
        remedy = f"choose {'one of these' if len(strides) > 1 else 'that'}, or train with model.strides [..., {stride}]"
        raise UserError(f"stride {stride}: the model was trained with the time stride {known}: {remedy}")
