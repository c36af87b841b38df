"""Top-k gating in Triton: two launches forward (eight in probability order), one backward.

Tokens are cut into G chunks, one program each. The first launch routes every token and counts the experts
chosen in its chunk; in the second, each program adds up the counts of the preceding chunks, which gives its tokens
their positions in the experts' queues. Every sum has a fixed order, so the bits are the same in every run.

Shapes: N tokens, E experts (E_PAD: the next power of two), K slots per expert, G chunks, D model width,
R routing width (R_PAD likewise), J experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels import gating_select_triton
from shodh_moe.kernels.backend import dot_precision, launch, settings
from shodh_moe.kernels.gating_parts_triton import count_digit, one_hot, pick, sum_of_chunks, totals

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
CHUNKS = 256  # most chunks; constant, so that the order of the sums does not depend on the device


@triton.jit
def _cosine_logits(
    x_ptr, projection_ptr, prototypes_ptr, temperature_ptr, q_ptr, token_N, live_N, column_E,
    E: tl.constexpr, E_PAD: tl.constexpr, D, R: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits <q, P_e> / (|q| |P_e|) / tau with q = W x, [BLOCK_N, E_PAD]. Stores q for the backward pass."""
    column_R = tl.arange(0, R_PAD)
    live_R = column_R < R
    q = tl.zeros([BLOCK_N, R_PAD], tl.float32)
    for start in range(0, D, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        at = x_ptr + token_N[:, None].to(tl.int64) * D + column_D[None, :]
        x = tl.load(at, mask=live_N[:, None] & (column_D[None, :] < D), other=0.0).to(tl.float32)
        at = projection_ptr + column_R[None, :] * D + column_D[:, None]
        w = tl.load(at, mask=live_R[None, :] & (column_D[:, None] < D), other=0.0)
        q = tl.dot(x, w, q, input_precision=PRECISION)
    tl.store(q_ptr + token_N[:, None].to(tl.int64) * R + column_R[None, :], q, mask=live_N[:, None] & live_R[None, :])
    at = prototypes_ptr + column_E[None, :] * R + column_R[:, None]
    prototypes = tl.load(at, mask=(column_E[None, :] < E) & live_R[:, None], other=0.0)
    # Norms are at least 1e-12, as in torch.nn.functional.normalize.
    q = q / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), 1e-12)[:, None]
    prototypes = prototypes / tl.maximum(tl.sqrt(tl.sum(prototypes * prototypes, axis=0)), 1e-12)[None, :]
    return tl.dot(q, prototypes, input_precision=PRECISION) / tl.load(temperature_ptr)


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, expert_ptr, gate_ptr, rank_ptr, entropy_ptr, lse_ptr,
    count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr, x_ptr, projection_ptr, prototypes_ptr, temperature_ptr, q_ptr,
    histogram_ptr, tokens, tiles, D, E: tl.constexpr, E_PAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HISTOGRAM: tl.constexpr, SHIFT: tl.constexpr, DIGIT: tl.constexpr, COSINE: tl.constexpr, R: tl.constexpr,
    R_PAD: tl.constexpr, PRECISION: tl.constexpr, J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute each token's softmax, experts and positions in the chunk's queues, and the sums over the chunk."""
    chunk = tl.program_id(0)
    column_E = tl.arange(0, E_PAD)
    live_E = column_E < E
    count_E = tl.zeros([E_PAD], tl.int32)
    p_sum_E = tl.zeros([E_PAD], tl.float32)
    z_sum_N = tl.zeros([BLOCK_N], tl.float32)
    broken_N = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
    for tile in range(tiles):
        token_N = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        live_N = token_N < tokens
        live_NE = live_N[:, None] & live_E[None, :]
        at_NE = logits_ptr + token_N[:, None].to(tl.int64) * E + column_E[None, :]
        if COSINE:
            logits = _cosine_logits(
                x_ptr, projection_ptr, prototypes_ptr, temperature_ptr, q_ptr, token_N, live_N, column_E,
                E, E_PAD, D, R, R_PAD, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
            tl.store(at_NE, logits, mask=live_NE)
        else:
            logits = tl.load(at_NE, mask=live_NE, other=0.0).to(tl.float32)
        logits = tl.where(live_E[None, :], logits, float("-inf"))

        top_N = tl.max(logits, axis=1)
        nan_N = tl.max((logits != logits).to(tl.int32), axis=1) > 0
        bad_N = live_N & (nan_N | (top_N == float("inf")) | (top_N == float("-inf")))
        broken_N = tl.minimum(broken_N, tl.where(bad_N, token_N, 0x7FFFFFFF))
        shifted = logits - top_N[:, None]
        exp = tl.exp(shifted)
        total_N = tl.sum(exp, axis=1)
        p = exp / total_N[:, None]
        lse_N = top_N + tl.log(total_N)
        entropy_N = tl.log(total_N) - tl.sum(tl.where(exp > 0, p * shifted, 0.0), axis=1)

        score, best_N = logits, top_N
        if HAS_BIAS:
            bias_E = tl.load(bias_ptr + column_E, mask=live_E, other=0.0).to(tl.float32)
            score = tl.where(live_E[None, :], p + bias_E[None, :], float("-inf"))
            best_N = tl.max(score, axis=1)
        if J > 1:
            # NaN and -inf become finite, so that a chosen expert, set to -inf, is never chosen again.
            score = tl.where(live_E[None, :] & ~(score >= LOWEST), LOWEST, score)
        chosen = tl.zeros([BLOCK_N, E_PAD], tl.int32)
        packed_N = tl.zeros([BLOCK_N], tl.int64)  # the token's experts, eight bits each
        for j in range(J):
            if J > 1:
                best_N = tl.max(score, axis=1)
            # The lowest index among equal scores. NaN equals nothing, but such a token still gets an index in range.
            expert_N = tl.min(tl.where(score == best_N[:, None], column_E[None, :], E - 1), axis=1)
            packed_N |= expert_N.to(tl.int64) << (8 * j)
            chosen_j = one_hot(expert_N, live_N, column_E)
            chosen += chosen_j
            if J > 1:
                score = tl.where(chosen_j > 0, float("-inf"), score)
        position = tl.cumsum(chosen, axis=0) + count_E[None, :]
        for j in range(J):
            expert_N = ((packed_N >> (8 * j)) & 255).to(tl.int32)
            chosen_j = one_hot(expert_N, live_N, column_E)
            rank_N = pick(position, chosen_j) - 1
            gate_N = tl.sum(tl.where(chosen_j > 0, p, 0.0), axis=1)
            tl.store(expert_ptr + token_N * J + j, expert_N.to(tl.int64), mask=live_N)
            tl.store(gate_ptr + token_N * J + j, gate_N, mask=live_N)
            tl.store(rank_ptr + token_N * J + j, rank_N.to(tl.int64), mask=live_N)
            if HISTOGRAM:
                count_digit(histogram_ptr, expert_N, gate_N.to(tl.int32, bitcast=True), live_N, SHIFT, DIGIT)

        count_E += tl.sum(chosen, axis=0)
        p_sum_E += tl.sum(tl.where(live_NE, p, 0.0), axis=0)
        z_sum_N += tl.where(live_N, lse_N * lse_N, 0.0)
        tl.store(entropy_ptr + token_N, entropy_N, mask=live_N)
        tl.store(lse_ptr + token_N, lse_N, mask=live_N)
    tl.store(count_ptr + chunk * E + column_E, count_E, mask=live_E)
    tl.store(p_sum_ptr + chunk * E + column_E, p_sum_E, mask=live_E)
    tl.store(z_sum_ptr + chunk, tl.sum(z_sum_N, axis=0))
    tl.store(broken_ptr + chunk, tl.min(broken_N, axis=0))


@triton.jit
def _slot_kernel(
    expert_ptr, slot_ptr, count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr,
    routed_ptr, kept_ptr, balance_ptr, z_ptr, mean_p_ptr, first_broken_ptr, tokens, tiles, capacity,
    chunks: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, G_PAD: tl.constexpr, J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn positions in the chunk's queue into positions in the expert's queue, and these into slots (-1 if dropped).

    The last program computes the totals.
    """
    chunk = tl.program_id(0)
    column_E = tl.arange(0, E_PAD)
    if chunk == chunks:
        totals(
            count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr, routed_ptr, kept_ptr, balance_ptr, z_ptr, mean_p_ptr,
            first_broken_ptr, tokens, capacity, column_E, chunks, E, E_PAD, G_PAD, J,
        )  # fmt: skip
    else:
        before_E = sum_of_chunks(count_ptr, 0, chunk, column_E, E, E_PAD)
        for tile in range(tiles):
            token_N = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
            live_N = token_N < tokens
            for j in range(J):
                expert_N = tl.load(expert_ptr + token_N * J + j, mask=live_N, other=0).to(tl.int32)
                chosen = one_hot(expert_N, live_N, column_E)
                slot_N = tl.load(slot_ptr + token_N * J + j, mask=live_N, other=0) + pick(before_E[None, :], chosen)
                tl.store(slot_ptr + token_N * J + j, tl.where(slot_N < capacity, slot_N, -1), mask=live_N)


@triton.jit
def _backward_kernel(
    logits_ptr, lse_ptr, expert_ptr, routed_ptr, d_gate_ptr, d_balance_ptr, d_z_ptr, d_mean_p_ptr, out_ptr, tokens,
    E: tl.constexpr, E_PAD: tl.constexpr, J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The formula of `gating._reference_backward`."""
    token_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_N = token_N < tokens
    column_E = tl.arange(0, E_PAD)
    live_NE = live_N[:, None] & (column_E[None, :] < E)
    at_NE = token_N[:, None].to(tl.int64) * E + column_E[None, :]
    logits = tl.load(logits_ptr + at_NE, mask=live_NE, other=float("-inf")).to(tl.float32)
    lse_N = tl.load(lse_ptr + token_N, mask=live_N, other=0.0)
    fraction_E = tl.load(routed_ptr + column_E, mask=column_E < E, other=0).to(tl.float32) / (tokens * J)
    p = tl.exp(logits - lse_N[:, None])
    g_E = (tl.load(d_balance_ptr) * E / tokens) * fraction_E
    g_E += tl.load(d_mean_p_ptr + column_E, mask=column_E < E, other=0.0) / tokens
    g = tl.zeros([BLOCK_N, E_PAD], tl.float32) + g_E[None, :]
    for j in range(J):
        expert_N = tl.load(expert_ptr + token_N * J + j, mask=live_N, other=0).to(tl.int32)
        d_gate_N = tl.load(d_gate_ptr + token_N * J + j, mask=live_N, other=0.0)
        g += tl.where(column_E[None, :] == expert_N[:, None], d_gate_N[:, None], 0.0)
    d_z_N = tl.load(d_z_ptr) * 2 / tokens * lse_N
    d_logits = p * (g - tl.sum(p * g, axis=1)[:, None] + d_z_N[:, None])
    tl.store(out_ptr + at_NE, d_logits.to(out_ptr.dtype.element_ty), mask=live_NE)


class Cosine(NamedTuple):
    """Inputs of cosine scores that the routing launch computes; all float32 except the tokens."""

    x_ND: Tensor
    projection_RD: Tensor
    prototypes_ER: Tensor
    temperature: Tensor  # one element


def _tile(padded_experts: int) -> int:
    """Number of tokens in a tile of about 2048 logits."""
    return min(max(2048 // padded_experts, 16), 256)


def forward(
    logits_NE: Tensor,
    capacity: int,
    drop_order: str,
    bias_E: Tensor | None,
    top_k: int = 1,
    cosine: Cosine | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tensors of `Gating`, and the index of the first token without a softmax (2^31 - 1: none).

    With ``cosine``, ``logits_NE`` (float32) is written instead of read, and q [N, R] is the last tensor returned.
    """
    logits_NE = logits_NE.contiguous()
    tokens, experts = logits_NE.shape
    device, pad = logits_NE.device, triton.next_power_of_2(experts)
    if cosine is None:
        default = {"BLOCK_N": _tile(pad), "num_warps": 8 if pad > 64 else 4}
        chosen = settings("gating", f"E{pad}", default, device)
    else:
        pad_r = max(triton.next_power_of_2(cosine.projection_RD.shape[0]), 16)
        default = {"BLOCK_N": 32 if pad_r <= 64 else 16, "BLOCK_D": 32, "num_warps": 4}
        chosen = settings("cosine_gating", f"E{pad}_R{pad_r}", default, device)
    sizes = {"E": experts, "E_PAD": pad, "BLOCK_N": chosen["BLOCK_N"], "num_warps": chosen["num_warps"], "J": top_k}
    tiles = triton.cdiv(triton.cdiv(tokens, sizes["BLOCK_N"]), CHUNKS)
    chunks = triton.cdiv(tokens, sizes["BLOCK_N"] * tiles)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    choices = (tokens,) if top_k == 1 else (tokens, top_k)
    expert_N, slot_N, gate_N = empty(choices, i64), empty(choices, i64), empty(choices, f32)
    entropy_N, lse_N, mean_p_E = empty((tokens,), f32), empty((tokens,), f32), empty((experts,), f32)
    count_GE, p_sum_GE = empty((chunks, experts), i32), empty((chunks, experts), f32)
    z_sum_G, broken_G = empty((chunks,), f32), empty((chunks,), i32)
    routed_E, kept_E = empty((experts,), i64), empty((experts,), i64)
    balance, z, first_broken = empty((), f32), empty((), f32), empty((1,), i32)

    if cosine is None:
        x = projection = prototypes = temperature = q_NR = logits_NE  # placeholders that are not accessed
        width, routing_width = 1, 1
    else:
        x, projection, prototypes, temperature = (t.contiguous() for t in cosine)
        width, routing_width = x.shape[1], projection.shape[0]
        q_NR = empty((tokens, routing_width), f32)
    histogram = gating_select_triton.histograms(experts, device) if drop_order == "probability" else broken_G
    launch(
        _route_kernel, (chunks,), logits_NE, logits_NE if bias_E is None else bias_E.contiguous(), expert_N, gate_N,
        slot_N, entropy_N, lse_N, count_GE, p_sum_GE, z_sum_G, broken_G, x, projection, prototypes, temperature, q_NR,
        histogram, tokens, tiles, width, HAS_BIAS=bias_E is not None, HISTOGRAM=drop_order == "probability",
        SHIFT=gating_select_triton.FIRST_SHIFT, DIGIT=gating_select_triton.DIGIT, COSINE=cosine is not None,
        R=routing_width,
        R_PAD=max(triton.next_power_of_2(routing_width), 16), PRECISION=dot_precision(f32),
        BLOCK_D=chosen.get("BLOCK_D", 16), **sizes,
    )  # fmt: skip
    sums = (count_GE, p_sum_GE, z_sum_G, broken_G, routed_E, kept_E, balance, z, mean_p_E, first_broken)
    sizes |= {"chunks": chunks, "G_PAD": triton.next_power_of_2(chunks)}
    if drop_order == "position":
        launch(_slot_kernel, (chunks + 1,), expert_N, slot_N, *sums, tokens, tiles, capacity, **sizes)
    else:
        gating_select_triton.assign_slots(expert_N, gate_N, slot_N, histogram, sums, tiles, capacity, sizes)
    results = (gate_N, expert_N, slot_N, routed_E, kept_E, entropy_N, balance, z, lse_N, mean_p_E)
    return (results if cosine is None else (*results, q_NR)), first_broken


def backward(
    logits_NE: Tensor, lse_N: Tensor, expert_N: Tensor, routed_E: Tensor,
    d_gate_N: Tensor, d_balance: Tensor, d_z: Tensor, d_mean_p_E: Tensor,
) -> Tensor:  # fmt: skip
    """d logits [N, E] in the dtype of the logits, one launch."""
    logits_NE = logits_NE.contiguous()
    tokens, experts = logits_NE.shape
    pad = triton.next_power_of_2(experts)
    default = {"BLOCK_N": _tile(pad), "num_warps": 4}
    chosen = settings("gating_backward", f"E{pad}", default, logits_NE.device)
    out_NE = torch.empty_like(logits_NE)
    launch(
        _backward_kernel, (triton.cdiv(tokens, chosen["BLOCK_N"]),), logits_NE, lse_N, expert_N, routed_E,
        d_gate_N.contiguous(), d_balance, d_z, d_mean_p_E.contiguous(), out_NE, tokens, E=experts, E_PAD=pad,
        J=expert_N.numel() // tokens, **chosen,
    )  # fmt: skip
    return out_NE
