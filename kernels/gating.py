"""Top-k gating with capacity dropping: assign each token one or several experts, and a slot at each of them.

Shapes: N tokens, E experts, K capacity slots per expert, J experts per token. With J > 1 the tensors ``gate_N``,
``expert_N`` and ``slot_N`` are [N, J] everywhere, and a choice is a token with one of its J experts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shodh_moe.base.tensors import count_classes
from shodh_moe.kernels.backend import exact, recording, use_triton

MAX_EXPERTS = 256
MAX_CHOICES = 8  # experts per token
DROP_ORDERS = ("position", "probability")


class Gating(NamedTuple):
    """Routing of N tokens. float32 entries are float64 for float64 logits."""

    gate_N: Tensor  # float32, softmax probability of the chosen expert; carries the router's gradient
    expert_N: Tensor  # int64, the chosen expert, also of dropped tokens; with J > 1 all different, the best first
    slot_N: Tensor  # int64 in [0, K), -1 if the token was dropped; an expert's kept tokens fill 0, 1, ... in order
    routed_E: Tensor  # int64, number of tokens that chose the expert
    kept_E: Tensor  # int64, number of tokens that got a slot
    entropy_N: Tensor  # float32, entropy of the softmax in nats; detached; always [N]
    balance_loss: Tensor  # scalar, E * sum_e(mean p_e * fraction_e), with fractions of choices before dropping
    z_loss: Tensor  # scalar, mean(logsumexp(logits)^2)
    logsumexp_N: Tensor  # float32, logsumexp of the logits; detached; not finite if the logits have no softmax; [N]
    mean_p_E: Tensor  # float32, mean softmax over the tokens; differentiable


def expert_capacity(tokens: int, experts: int, factor: float, minimum: int) -> int:
    """Slots per expert, ``max(ceil(tokens / experts * factor), minimum)``, in exact arithmetic.

    ``factor`` is taken as the decimal number it prints as: 50 tokens, 4 experts and 1.2 give 15, where float32
    arithmetic would give 16.
    """
    return max(math.ceil(Fraction(tokens, experts) * Fraction(repr(float(factor)))), minimum)


def topk_gating(
    logits_NE: Tensor,
    capacity: int,
    drop_order: str = "position",
    bias_E: Tensor | None = None,
    check_finite: bool = True,
    top_k: int = 1,
) -> Gating:
    """Route each token to its best experts and give it a slot there until the slots run out (DESIGN 3.5).

    Args:
        logits_NE: router logits, float32, bfloat16 or float16, computed in float32; float64 stays float64
            (and runs the torch reference on every device).
        capacity: slots per expert, K.
        drop_order: which tokens an overflowing expert keeps: ``position`` keeps the earliest, ``probability`` the
            most probable, ties by position. Kept tokens are in token order either way.
        bias_E: added to the probabilities only for choosing experts; gets no gradient.
        check_finite: raise ValueError for logits that have no softmax. On a GPU the check waits for the device. Without
            it, such a token's gate and both losses are NaN, and its expert is an arbitrary index in range.
        top_k: experts per token, J.

    Without a bias the J experts with the largest logits are chosen, and the lowest index among equals. Gates are the
    softmax's probabilities over all experts, not renormalised over the chosen ones, so that one expert per token is the
    case J = 1. Each choice claims a slot: ``position`` is the order of the tokens, for first and later choices alike,
    ``probability`` that of the gates. The balance loss is that of the Switch Transformer (arXiv 2101.03961, eq. 4),
    which is 1 for an even load at every J, the z-loss that of ST-MoE (arXiv 2202.08906, eq. 5).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or a token's logits are NaN,
            contain +inf, or are all -inf.
    """
    check_tensor("logits_NE", logits_NE, 2)
    check_routing(logits_NE.shape[0], logits_NE.shape[1], capacity, drop_order, bias_E, top_k, logits_NE)
    return Gating(*torch.ops.shodh.topk_gating(logits_NE, capacity, drop_order, bias_E, check_finite, top_k))


def describe_tensor(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_tensor(name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.ndim != dimensions or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"{name} must be a {dimensions}-dimensional floating-point tensor, not {describe_tensor(tensor)}"
        )


def check_routing(
    tokens: int, experts: int, capacity: int, drop_order: str, bias_E: Tensor | None, top_k: int, like: Tensor
) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"gating handles 1 to {MAX_EXPERTS} experts, not {experts}")
    if not 1 <= top_k <= min(experts, MAX_CHOICES):
        raise ValueError(f"top_k must be between 1 and {min(experts, MAX_CHOICES)} of {experts} experts, not {top_k}")
    if tokens < 1 or tokens * top_k >= 2**31:
        raise ValueError(f"gating needs between 1 and 2^31 - 1 tokens, not {tokens}, times top_k {top_k}")
    if not 1 <= capacity < 2**31:
        raise ValueError(f"capacity must be between 1 and 2^31 - 1 slots, not {capacity}")
    if drop_order not in DROP_ORDERS:
        raise ValueError(f"drop_order must be 'position' or 'probability', not {drop_order!r}")
    if bias_E is not None and (tuple(bias_E.shape) != (experts,) or bias_E.device != like.device):
        raise ValueError(f"bias_E must be [{experts}] on {like.device}, not {describe_tensor(bias_E)}")


# The torch reference, which defines the result ------------------------------------------------------------


def reference_gating(
    logits_NE: Tensor, capacity: int, drop_order: str, bias_E: Tensor | None, top_k: int = 1
) -> Gating:
    """`topk_gating` in plain torch, differentiable by autograd; NaN propagates."""
    logits_NE = logits_NE if logits_NE.dtype == torch.float64 else logits_NE.float()
    tokens, experts = logits_NE.shape
    log_p_NE = torch.log_softmax(logits_NE, dim=1)
    p_NE = log_p_NE.exp()
    # Without a bias, compare logits: rounding can make probabilities equal where logits are not.
    score_NE = logits_NE.detach() if bias_E is None else p_NE.detach() + bias_E.detach()
    expert_N = _best(score_NE, top_k)
    gate_N = p_NE.gather(1, expert_N.view(tokens, top_k)).view(expert_N.shape)
    routed_E = count_classes(expert_N, experts)
    fraction_E = routed_E.to(p_NE.dtype) / (tokens * top_k)
    mean_p_E = p_NE.mean(dim=0)
    slot_N = assign_slots(expert_N.flatten(), gate_N.detach().flatten(), routed_E, capacity, drop_order)
    logsumexp_N = torch.logsumexp(logits_NE, dim=1)
    return Gating(
        gate_N=gate_N,
        expert_N=expert_N,
        slot_N=slot_N.view(expert_N.shape),
        routed_E=routed_E,
        kept_E=routed_E.clamp(max=capacity),
        entropy_N=torch.special.entr(p_NE.detach()).sum(dim=1),
        balance_loss=experts * (mean_p_E * fraction_E).sum(),
        z_loss=logsumexp_N.square().mean(),
        logsumexp_N=logsumexp_N.detach(),
        mean_p_E=mean_p_E,
    )


def _best(score_NE: Tensor, top_k: int) -> Tensor:
    """Indices of the ``top_k`` largest scores of each row, the first of equal ones: int64 [N], or [N, J] with J > 1."""
    if top_k == 1:
        return score_NE.argmax(dim=1)
    # Scores of -inf become finite, so that a chosen expert, set to -inf, is never chosen again.
    score_NE = score_NE.clamp(min=torch.finfo(score_NE.dtype).min)
    chosen = []
    for _ in range(top_k):
        chosen.append(score_NE.argmax(dim=1, keepdim=True))
        score_NE.scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)


def assign_slots(expert_N: Tensor, gate_N: Tensor, routed_E: Tensor, capacity: int, drop_order: str) -> Tensor:
    """Slot of each token, or of each choice in the order of the tokens, in [0, capacity), -1 if dropped: int64 [N]."""
    if drop_order == "probability":
        # Group by expert, in order of decreasing probability; both sorts are stable, so ties stay in token order.
        order = torch.argsort(gate_N, descending=True, stable=True)
        order = order[torch.argsort(expert_N[order], stable=True)]
        kept_N = torch.empty_like(expert_N, dtype=torch.bool)
        kept_N[order] = _rank_in_block(expert_N[order], routed_E) < capacity
        # Dropped tokens form a class of their own, so that kept tokens fill their slots without gaps.
        dropped = expert_N.numel() - kept_N.sum(dim=0, keepdim=True)
        expert_N = torch.where(kept_N, expert_N, routed_E.numel())
        routed_E = torch.cat((routed_E.clamp(max=capacity), dropped))
    order = torch.argsort(expert_N, stable=True)
    rank_N = torch.empty_like(expert_N)
    rank_N[order] = _rank_in_block(expert_N[order], routed_E)
    kept_N = rank_N < capacity if drop_order == "position" else kept_N
    return torch.where(kept_N, rank_N, -1)


def _rank_in_block(sorted_expert_N: Tensor, count_E: Tensor) -> Tensor:
    """Position of each entry within its expert, for a list sorted by expert: int64 [N]."""
    start_E = count_E.cumsum(0) - count_E
    return torch.arange(sorted_expert_N.numel(), device=count_E.device) - start_E[sorted_expert_N]


def _reference_backward(
    logits_NE: Tensor, lse_N: Tensor, expert_N: Tensor, routed_E: Tensor,
    d_gate_N: Tensor, d_balance: Tensor, d_z: Tensor, d_mean_p_E: Tensor,
) -> Tensor:  # fmt: skip
    """d logits = p * (g - <p, g>) + p * d_z * 2 lse / N.

    g_e = d_gate [e chosen] + d_balance E fraction_e / N + d_mean_p_e / N.
    """
    tokens, experts = logits_NE.shape
    p_NE = (logits_NE.to(lse_N.dtype) - lse_N[:, None]).exp()
    g_E = d_balance * (experts / (tokens * expert_N.numel())) * routed_E.to(lse_N.dtype) + d_mean_p_E / tokens
    expert_NJ, d_gate_NJ = expert_N.view(tokens, -1), d_gate_N.reshape(tokens, -1)
    inner_N = p_NE @ g_E + (d_gate_NJ * p_NE.gather(1, expert_NJ)).sum(dim=1)
    factor_NE = g_E[None, :] + (d_z * (2 / tokens) * lse_N - inner_N)[:, None]
    factor_NE.scatter_add_(1, expert_NJ, d_gate_NJ)
    return (p_NE * factor_NE).to(logits_NE.dtype)


# The custom operators -------------------------------------------------------------------------------------

SCHEMA = "int capacity, str drop_order, Tensor? bias_E, bool check_finite, int top_k"
OUTPUTS = ", ".join(["Tensor"] * len(Gating._fields))


def raise_if_broken(first_broken: Tensor) -> None:
    token = int(first_broken)
    if token < 2**31 - 1:
        raise ValueError(
            f"router logits of token {token} are NaN or infinite: the activations before the router diverged"
        )


def _first_broken(logits_NE: Tensor) -> Tensor:
    broken_N = ~logits_NE.amax(dim=1).isfinite()
    return torch.where(broken_N.any(), broken_N.to(torch.int8).argmax(), 2**31 - 1)


def runs_triton(logits_NE: Tensor) -> bool:
    return logits_NE.dtype != torch.float64 and use_triton(logits_NE)


def gate(
    logits_NE: Tensor, capacity: int, drop_order: str, bias_E: Tensor | None, check_finite: bool, top_k: int
) -> tuple[Tensor, ...]:
    if runs_triton(logits_NE):
        from shodh_moe.kernels import gating_triton

        outputs, first_broken = gating_triton.forward(logits_NE, capacity, drop_order, bias_E, top_k)
    else:
        outputs = reference_gating(logits_NE, capacity, drop_order, bias_E, top_k)
        first_broken = _first_broken(logits_NE) if check_finite else outputs.z_loss
    if check_finite and not recording():
        raise_if_broken(first_broken)
    return outputs


def fake_outputs(logits_NE: Tensor, top_k: int) -> tuple[Tensor, ...]:
    tokens, experts = logits_NE.shape
    choices = (tokens,) if top_k == 1 else (tokens, top_k)
    exact = torch.float64 if logits_NE.dtype == torch.float64 else torch.float32

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits_NE.new_empty(shape, dtype=dtype)

    i64 = torch.int64
    return (
        new(exact, *choices), new(i64, *choices), new(i64, *choices), new(i64, experts), new(i64, experts),
        new(exact, tokens), new(exact), new(exact), new(exact, tokens), new(exact, experts),
    )  # fmt: skip


def _save_gating(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, expert_N, slot_N, routed_E, kept_E, entropy_N, _, _, lse_N, _ = output
    ctx.save_for_backward(inputs[0], lse_N, expert_N, routed_E)
    ctx.mark_non_differentiable(expert_N, slot_N, routed_E, kept_E, entropy_N, lse_N)


def _gating_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    d_logits_NE = torch.ops.shodh.topk_gating_backward(*ctx.saved_tensors, grads[0], grads[6], grads[7], grads[9])
    return d_logits_NE, None, None, None, None, None


def _gate_backward(
    logits_NE: Tensor, lse_N: Tensor, expert_N: Tensor, routed_E: Tensor,
    d_gate_N: Tensor, d_balance: Tensor, d_z: Tensor, d_mean_p_E: Tensor,
) -> Tensor:  # fmt: skip
    if runs_triton(logits_NE):
        from shodh_moe.kernels import gating_triton

        return gating_triton.backward(logits_NE, lse_N, expert_N, routed_E, d_gate_N, d_balance, d_z, d_mean_p_E)
    with exact(logits_NE):
        return _reference_backward(logits_NE, lse_N, expert_N, routed_E, d_gate_N, d_balance, d_z, d_mean_p_E)


_op = torch.library.custom_op(
    "shodh::topk_gating", gate, mutates_args=(), schema=f"(Tensor logits_NE, {SCHEMA}) -> ({OUTPUTS})"
)
_op.register_fake(lambda logits_NE, *settings: fake_outputs(logits_NE, settings[-1]))
_op.register_autograd(_gating_gradient, setup_context=_save_gating)

_op_backward = torch.library.custom_op("shodh::topk_gating_backward", _gate_backward, mutates_args=())
_op_backward.register_fake(lambda logits_NE, *_: torch.empty_like(logits_NE, memory_format=torch.contiguous_format))
