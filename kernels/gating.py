"""Top-1 gating with capacity dropping: which expert each token goes to, and in which slot.

Shapes: N tokens, E experts, K capacity slots per expert.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Gating(NamedTuple):
    """Routing of N tokens. ``slot_N`` is -1 where the token was dropped."""

    expert_N: Tensor  # int64, the routed expert, dropped or not
    gate_N: Tensor  # float32, softmax probability of that expert; carries the router's gradient
    slot_N: Tensor  # int64 in [0, K), or -1
    routed_E: Tensor  # int64, tokens that chose the expert
    kept_E: Tensor  # int64, tokens that found a slot
    entropy_N: Tensor  # float32, nats, of the softmax; detached
    balance_loss: Tensor  # scalar, E * sum_e(mean p_e * fraction_e), counts before dropping
    z_loss: Tensor  # scalar, mean(logsumexp(logits)^2)


def expert_capacity(tokens: int, experts: int, factor: float, minimum: int) -> int:
    """Slots per expert, ``max(ceil(tokens / experts * factor), minimum)``, in exact arithmetic.

    ``factor`` counts as the decimal number that it prints as, so 50 tokens, 4 experts and 1.2 give 15;
    float32 arithmetic would give 16.
    """
    return max(math.ceil(Fraction(tokens, experts) * Fraction(repr(float(factor)))), minimum)


def top1_gating(logits_NE: Tensor, capacity: int, drop_order: str = "position", bias_E: Tensor | None = None) -> Gating:
    """Route each token to its best expert and give it a slot there while there is room (DESIGN 3.5).

    Args:
        logits_NE: router logits, float32 or bfloat16; computed in float32 (float64 stays float64).
        capacity: slots per expert.
        drop_order: who keeps a slot when an expert overflows: ``position`` the earliest tokens,
            ``probability`` the most probable, ties by position. Kept tokens sit in token order either way.
        bias_E: added to the probabilities for the choice only, without gradient.

    Ties choose the lowest expert. The balance loss is the Switch Transformer's (arXiv 2101.03961, eq. 4),
    the z-loss ST-MoE's (arXiv 2202.08906, eq. 5).

    Raises:
        ValueError: a logit is NaN, or the drop order is unknown.
    """
    if drop_order not in ("position", "probability"):
        raise ValueError(f"drop_order must be 'position' or 'probability', not {drop_order!r}")
    if torch.isnan(logits_NE).any():
        token = int(torch.isnan(logits_NE).any(dim=1).nonzero()[0])
        raise ValueError(f"router logits of token {token} are NaN: the activations before the router diverged")
    logits_NE = logits_NE if logits_NE.dtype == torch.float64 else logits_NE.float()
    tokens, experts = logits_NE.shape

    log_p_NE = torch.log_softmax(logits_NE, dim=1)
    p_NE = log_p_NE.exp()
    score_NE = p_NE.detach() if bias_E is None else p_NE.detach() + bias_E.detach()
    # On equal values torch.max may return any of them; the comparison fixes the lowest index.
    best_N = (score_NE == score_NE.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)
    gate_N = p_NE.gather(1, best_N[:, None]).squeeze(1)
    routed_E = torch.bincount(best_N, minlength=experts)

    if drop_order == "position":
        kept_N = _rank_within_expert(best_N, experts) < capacity
    else:
        order = torch.argsort(gate_N.detach(), descending=True, stable=True)
        kept_N = torch.empty(tokens, dtype=torch.bool, device=best_N.device)
        kept_N[order] = _rank_within_expert(best_N[order], experts) < capacity
    # Dropped tokens count in a class of their own, so the kept ones fill their slots without holes.
    slot_N = _rank_within_expert(torch.where(kept_N, best_N, experts), experts + 1)
    slot_N = torch.where(kept_N, slot_N, -1)

    fraction_E = routed_E.to(p_NE.dtype) / tokens
    return Gating(
        expert_N=best_N,
        gate_N=gate_N,
        slot_N=slot_N,
        routed_E=routed_E,
        kept_E=torch.bincount(best_N[kept_N], minlength=experts),
        entropy_N=torch.special.entr(p_NE.detach()).sum(dim=1),
        balance_loss=experts * (p_NE.mean(dim=0) * fraction_E).sum(),
        z_loss=torch.logsumexp(logits_NE, dim=1).square().mean(),
    )


def _rank_within_expert(expert_N: Tensor, experts: int) -> Tensor:
    """How many earlier tokens chose the same expert. int64 [N]."""
    order = torch.argsort(expert_N, stable=True)
    count_E = torch.bincount(expert_N, minlength=experts)
    start_E = count_E.cumsum(0) - count_E
    rank_N = torch.empty_like(expert_N)
    rank_N[order] = torch.arange(expert_N.numel(), device=expert_N.device) - start_E[expert_N[order]]
    return rank_N
