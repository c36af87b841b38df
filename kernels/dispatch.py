"""Tokens into their experts' slots, and back.

Shapes: N tokens, D width, E experts, K slots per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, experts: int, capacity: int) -> Tensor:
    """Copy each kept token into its slot: [E, K, D], empty slots zero. Dropped tokens (slot -1) go nowhere."""
    trash = experts * capacity
    row_N = torch.where(slot_N >= 0, expert_N * capacity + slot_N, trash)
    rows = x_ND.new_zeros(trash + 1, x_ND.shape[1]).index_copy(0, row_N, x_ND)
    return rows[:trash].view(experts, capacity, -1)


def combine(
    slots_EKD: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, shared_ND: Tensor | None = None
) -> Tensor:
    """y_n = shared_n + gate_n * slots[expert_n, slot_n]: [N, D] in the dtype of ``slots_EKD``.

    A dropped token (slot -1) gets the shared experts' output alone (DESIGN 3.4, 3.5).
    """
    experts, capacity, width = slots_EKD.shape
    kept_N = slot_N >= 0
    row_N = torch.where(kept_N, expert_N * capacity + slot_N, 0)
    routed_ND = slots_EKD.reshape(experts * capacity, width).index_select(0, row_N)
    scale_N = torch.where(kept_N, gate_N, 0).to(slots_EKD.dtype)
    y_ND = routed_ND * scale_N[:, None]
    return y_ND if shared_ND is None else shared_ND + y_ND
