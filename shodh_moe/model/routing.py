"""Record of the routing of one layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shodh_moe.kernels import Gating


class Routing(NamedTuple):
    """How one MoE layer routed its N tokens; `Gating` describes the fields.

    Only the losses and ``mean_p_E`` carry gradients. ``commitment_loss`` is the mean over tokens of -log p, where p is
    the probability of the token's expert. With top-k routing, p is that of all its experts together, and ``expert_N``
    and ``gate_N`` are those of its first choice.
    """

    balance_loss: Tensor
    z_loss: Tensor
    commitment_loss: Tensor
    expert_N: Tensor
    kept_N: Tensor  # bool, whether the token found a slot at its expert; in the shape of chosen_N
    entropy_N: Tensor
    gate_N: Tensor
    logsumexp_N: Tensor
    chosen_N: Tensor  # the experts of all choices: [N], or with J > 1 experts per token [N, J]
    routed_E: Tensor
    mean_p_E: Tensor


def routing_of(gating: Gating) -> Routing:
    """Make the record of a router's decision."""
    one = gating.expert_N.ndim == 1
    return Routing(
        balance_loss=gating.balance_loss,
        z_loss=gating.z_loss,
        commitment_loss=-(gating.gate_N if one else gating.gate_N.sum(1)).log().mean(),
        expert_N=gating.expert_N if one else gating.expert_N[:, 0],
        kept_N=gating.slot_N >= 0,
        entropy_N=gating.entropy_N,
        gate_N=gating.gate_N.detach() if one else gating.gate_N.detach()[:, 0],
        logsumexp_N=gating.logsumexp_N,
        chosen_N=gating.expert_N,
        routed_E=gating.routed_E,
        mean_p_E=gating.mean_p_E,
    )
