"""A router with experts that fine-tuning added: each takes the samples of its own domain and leaves all others alone.

Shapes: M rows of F features that the router scores, N tokens, E experts, K comparisons with another domain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.tensors import count_classes
from shodh_moe.kernels import Gating
from shodh_moe.kernels.gating import assign_slots
from shodh_moe.model.routers.router import Context, Router, Slots


class GrownRouter(nn.Module):
    """Decides as the router before the growth did, except for rows that an added expert takes, with gate 1.

    An added expert takes a row x if <margin, x> > 0 for all of its margins, one for each domain known when it was
    added. Of several that take a row, the one added last gets it. For every other row the expert and the gate are those
    of the router before, bit for bit, because they come from the same computation.

    Args:
        base: the router before the growth.
        dim: number of features F; the last one is 1, so that a margin can have a constant.
        num_experts: E, including those added.
        added: for each added expert its number of margins (``model.moe.router.added``).
    """

    def __init__(self, base: Router, dim: int, num_experts: int, added: list[int]):
        super().__init__()
        self.base, self.num_experts, self.added = base, num_experts, list(added)
        self.margins_KF = nn.Parameter(torch.zeros(sum(added), dim))

    @property
    def temperature(self) -> Tensor | None:
        """That of the router before."""
        return self.base.temperature

    @property
    def bias_E(self) -> Tensor | None:
        """That of the router before, for its experts only."""
        return self.base.bias_E

    @torch.no_grad()
    def taken(self, x_MF: Tensor) -> Tensor:
        """Number of the added expert that takes each row, int64 [M]; -1 where none does."""
        margins_MK = x_MF @ self.margins_KF.to(x_MF.dtype).T
        taken_M = torch.full((len(x_MF),), -1, device=x_MF.device)
        for number, margins_MD in enumerate(margins_MK.split(self.added, dim=1)):
            taken_M = torch.where((margins_MD > 0).all(dim=1), number, taken_M)
        return taken_M

    def forward(self, x_MF: Tensor, context: Context, slots: Slots) -> Gating:
        """See `Router`. The losses are those of the router before; it gives the added experts no probability."""
        assert slots.decision is None, "Config.samples_have_paths"
        assert slots.top_k == 1
        before = self.base(x_MF, context, slots)
        taken_N = self.taken(x_MF)
        if slots.row_N is not None:
            taken_N = taken_N.index_select(0, slots.row_N)
        new_N = taken_N >= 0
        expert_N = torch.where(new_N, self.num_experts - len(self.added) + taken_N, before.expert_N)
        gate_N = before.gate_N.masked_fill(new_N, 1.0)
        if torch.is_grad_enabled():  # every parameter needs a gradient, see `hold`
            gate_N = gate_N + 0 * self.margins_KF.sum().to(gate_N.dtype)
        routed_E = count_classes(expert_N, self.num_experts)
        return before._replace(
            gate_N=gate_N,
            expert_N=expert_N,
            slot_N=assign_slots(expert_N, gate_N.detach(), routed_E, slots.capacity, slots.drop_order),
            routed_E=routed_E,
            kept_E=routed_E.clamp(max=slots.capacity),
            entropy_N=before.entropy_N.masked_fill(new_N, 0.0),
            mean_p_E=F.pad(before.mean_p_E, (0, len(self.added))),
        )

    def start(self, x_MF: Tensor, seed: int) -> None:
        """See `Router`."""
        self.base.start(x_MF, seed)
