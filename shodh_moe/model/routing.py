"""Record of the routing of one layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shodh_moe.kernels import Gating


class Routing(NamedTuple):
    """How one MoE layer routed its N tokens. Only the losses carry gradients; `Gating` describes the other fields.

    ``commitment_loss`` is the mean of -log p over tokens, for the expert that each token chose.
    """

    balance_loss: Tensor
    z_loss: Tensor
    commitment_loss: Tensor
    expert_N: Tensor
    kept_N: Tensor  # bool, whether the token found a slot at its expert
    entropy_N: Tensor
    gate_N: Tensor
    logsumexp_N: Tensor


def routing_of(gating: Gating) -> Routing:
    """Make the record of a router's decision."""
    return Routing(
        balance_loss=gating.balance_loss,
        z_loss=gating.z_loss,
        commitment_loss=-gating.gate_N.log().mean(),
        expert_N=gating.expert_N,
        kept_N=gating.slot_N >= 0,
        entropy_N=gating.entropy_N,
        gate_N=gating.gate_N.detach(),
        logsumexp_N=gating.logsumexp_N,
    )
