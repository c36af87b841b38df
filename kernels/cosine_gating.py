"""Top-k gating by cosine scores, computed within the routing pass.

Shapes: N tokens, D model width, R routing width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.kernels.backend import exact, recording, use_triton
from shodh_moe.kernels.gating import (
    OUTPUTS,
    SCHEMA,
    Gating,
    check_routing,
    check_tensor,
    describe_tensor,
    fake_outputs,
    gate,
    raise_if_broken,
)

MAX_ROUTING_WIDTH = 128
FIELDS = len(Gating._fields)
FUSED_EXPERTS = 64  # most experts whose scores and prototypes for a tile fit in registers


def cosine_topk_gating(
    x_ND: Tensor,
    projection_RD: Tensor,
    prototypes_ER: Tensor,
    temperature: Tensor,
    capacity: int,
    drop_order: str = "position",
    bias_E: Tensor | None = None,
    check_finite: bool = True,
    top_k: int = 1,
) -> Gating:
    """`topk_gating` of the logits ``<W x, P_e> / (|W x| |P_e|) / tau`` (X-MoE, arXiv 2204.09179; DESIGN 3.5).

    With Triton and at most 64 experts, the logits are computed in the routing pass: the tokens are read once, and the
    only intermediate results written are W x and the logits, for the backward pass.

    Args:
        x_ND: tokens, float32, bfloat16 or float16; with float64, everything is float64 (torch reference).
        projection_RD: W, float32 (float64 for float64 tokens), R at most 128.
        prototypes_ER: P, dtype like W.
        temperature: tau, one element, positive, dtype like W.

    Other arguments and errors are those of `topk_gating`.
    """
    check_tensor("x_ND", x_ND, 2)
    check_tensor("prototypes_ER", prototypes_ER, 2)
    exact = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    experts, routing = prototypes_ER.shape
    for name, tensor, shape in (
        ("projection_RD", projection_RD, (routing, x_ND.shape[1])),
        ("prototypes_ER", prototypes_ER, (experts, routing)),
        ("temperature", temperature, (1,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != exact or tensor.device != x_ND.device:
            raise ValueError(f"{name} must be {exact} {list(shape)} on {x_ND.device}, not {describe_tensor(tensor)}")
    if routing > MAX_ROUTING_WIDTH:
        raise ValueError(f"prototypes_ER have {routing} dimensions; at most {MAX_ROUTING_WIDTH} are supported")
    check_routing(x_ND.shape[0], experts, capacity, drop_order, bias_E, top_k, x_ND)
    outputs = torch.ops.shodh.cosine_topk_gating(
        x_ND, projection_RD, prototypes_ER, temperature, capacity, drop_order, bias_E, check_finite, top_k
    )
    return Gating(*outputs[:FIELDS])


def reference_logits(q_NR: Tensor, prototypes_ER: Tensor, temperature: Tensor) -> Tensor:
    """Logits [N, E] of the projected tokens, in plain torch."""
    return F.normalize(q_NR, dim=1) @ F.normalize(prototypes_ER, dim=1).T / temperature


def _forward(
    x_ND: Tensor, projection_RD: Tensor, prototypes_ER: Tensor, temperature: Tensor,
    capacity: int, drop_order: str, bias_E: Tensor | None, check_finite: bool, top_k: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x_ND.dtype != torch.float64 and prototypes_ER.shape[0] <= FUSED_EXPERTS and use_triton(x_ND):
        from shodh_moe.kernels import gating_triton

        logits_NE = x_ND.new_empty((x_ND.shape[0], prototypes_ER.shape[0]), dtype=torch.float32)
        cosine = gating_triton.Cosine(x_ND, projection_RD, prototypes_ER, temperature)
        outputs, first_broken = gating_triton.forward(logits_NE, capacity, drop_order, bias_E, top_k, cosine)
        if check_finite and not recording():
            raise_if_broken(first_broken)
        return (*outputs[:FIELDS], logits_NE, outputs[FIELDS])
    with exact(x_ND):
        q_NR = F.linear(x_ND.to(projection_RD.dtype), projection_RD)
        logits_NE = reference_logits(q_NR, prototypes_ER, temperature)
    return (*gate(logits_NE, capacity, drop_order, bias_E, check_finite, top_k), logits_NE, q_NR)


def _fake(x_ND: Tensor, projection_RD: Tensor, prototypes_ER: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    tokens, (experts, routing) = x_ND.shape[0], prototypes_ER.shape
    logits_NE = projection_RD.new_empty((tokens, experts))
    return (*fake_outputs(logits_NE, settings[-1]), logits_NE, projection_RD.new_empty((tokens, routing)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, expert_N, slot_N, routed_E, kept_E, entropy_N, _, _, lse_N, _, logits_NE, q_NR = output
    ctx.save_for_backward(*inputs[:4], logits_NE, lse_N, expert_N, routed_E, q_NR)
    ctx.mark_non_differentiable(expert_N, slot_N, routed_E, kept_E, entropy_N, lse_N, logits_NE, q_NR)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, projection_RD, prototypes_ER, temperature, logits_NE, lse_N, expert_N, routed_E, q_NR = ctx.saved_tensors
    d_logits_NE = torch.ops.shodh.topk_gating_backward(
        logits_NE, lse_N, expert_N, routed_E, grads[0], grads[6], grads[7], grads[9]
    )
    with exact(x_ND):
        d_cosine_NE = d_logits_NE / temperature
        d_temperature = -(d_cosine_NE * logits_NE).sum().reshape(1)
        unit_NR, unit_ER = F.normalize(q_NR, dim=1), F.normalize(prototypes_ER, dim=1)
        d_q_NR = _through_normalize(d_cosine_NE @ unit_ER, unit_NR, q_NR)
        d_prototypes_ER = _through_normalize(d_cosine_NE.T @ unit_NR, unit_ER, prototypes_ER)
        d_projection_RD = d_q_NR.T @ x_ND.to(q_NR.dtype)
        d_x_ND = (d_q_NR @ projection_RD).to(x_ND.dtype)
    return d_x_ND, d_projection_RD, d_prototypes_ER, d_temperature, None, None, None, None, None


def _through_normalize(grad: Tensor, unit: Tensor, vector: Tensor) -> Tensor:
    """Gradient of v from the gradient of v / |v|, along the last axis."""
    norm = vector.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (grad - unit * (unit * grad).sum(dim=-1, keepdim=True)) / norm


_op = torch.library.custom_op(
    "shodh::cosine_topk_gating",
    _forward,
    mutates_args=(),
    schema="(Tensor x_ND, Tensor projection_RD, Tensor prototypes_ER, Tensor temperature, "
    f"{SCHEMA}) -> ({OUTPUTS}, Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_autograd(_gradient, setup_context=_save)
