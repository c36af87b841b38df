"""`dispatch`, `combine` and their backward passes in Triton, in one launch each over the tokens.

Shapes: N tokens, D width, E experts, K capacity slots per expert (R dropless), R rows, J experts per token, C = N J
choices (token, expert) in the order of the tokens.

A program copies BLOCK_N tokens or choices between token order and row order. An expert's tokens fill its first slots,
so its empty rows are at the end, where the first programs of the grid write zeros.
Each output element is written once, by one program: no atomics, no inverse map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels.backend import launch, settings

# Upper limit of the tiles of empty rows that one program zeroes.
ZERO_TILES = 8


@triton.jit
def _filled(kept_ptr, K, E, BLOCK_E: tl.constexpr):
    """Number of slots that each expert fills, int32 [BLOCK_E]."""
    experts = tl.arange(0, BLOCK_E)
    kept = tl.load(kept_ptr + experts, mask=experts < E, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(kept, 0), K).to(tl.int32)


@triton.jit
def _rows_of(c, expert_ptr, slot_ptr, kept_ptr, C, K, E, DROPLESS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The row of each choice, int64, and whether it has one."""
    inside = c < C
    expert = tl.load(expert_ptr + c, mask=inside, other=-1).to(tl.int64)
    slot = tl.load(slot_ptr + c, mask=inside, other=-1).to(tl.int64)
    known = (expert >= 0) & (expert < E)
    expert = tl.where(known, expert, 0)
    kept = tl.load(kept_ptr + expert, mask=known, other=0).to(tl.int64)
    valid = known & (slot >= 0) & (slot < tl.minimum(kept, K))
    if DROPLESS:
        before = tl.arange(0, BLOCK_E)[None, :] < expert[:, None]
        row = tl.sum(tl.where(before, _filled(kept_ptr, K, E, BLOCK_E)[None, :], 0), axis=1) + slot
        valid = valid & (row >= 0) & (row < C)
    else:
        row = expert * K + slot
    return row, valid


@triton.jit
def _zero_empty_rows(
    out_ptr, kept_ptr, pid, parts, K, E, D,
    DROPLESS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Zero part ``pid % parts`` of the empty slots of expert ``pid // parts`` (dropless: of the rows without token)."""
    region = (pid // parts).to(tl.int64)
    if DROPLESS:
        filled = tl.minimum(tl.sum(_filled(kept_ptr, K, E, BLOCK_E).to(tl.int64), axis=0), K)
    else:
        filled = tl.minimum(tl.maximum(tl.load(kept_ptr + region).to(tl.int64), 0), K)
    for first in range(filled.to(tl.int32) + (pid % parts) * BLOCK_N, K, parts * BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        row = region * K + slot
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            zero = tl.zeros((BLOCK_N, BLOCK_D), dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * D + d[None, :], zero, mask=(slot < K)[:, None] & (d < D)[None, :])


@triton.jit
def _dispatch_kernel(
    x_ptr, expert_ptr, slot_ptr, kept_ptr, out_ptr, zero_programs, parts, C, K, E, D,
    J: tl.constexpr, DROPLESS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    pid = tl.program_id(0)
    if pid < zero_programs:
        _zero_empty_rows(out_ptr, kept_ptr, pid, parts, K, E, D, DROPLESS, BLOCK_E, BLOCK_N, BLOCK_D)
    else:
        c = (pid - zero_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, valid = _rows_of(c, expert_ptr, slot_ptr, kept_ptr, C, K, E, DROPLESS, BLOCK_E)
        token = (c // J).to(tl.int64)[:, None] * D
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = valid[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + token + d[None, :], mask=mask)
            tl.store(out_ptr + row[:, None] * D + d[None, :], x, mask=mask)


@triton.jit
def _gather_kernel(
    rows_ptr, expert_ptr, slot_ptr, kept_ptr, gate_ptr, shared_ptr, y_ptr, N, K, E, D,
    J: tl.constexpr, DROPLESS: tl.constexpr, GATE: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """y_n = [shared_n +] sum_j [gate_nj *] rows[row_nj]; sums are in the dtype WIDE."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if J == 1:
        row, valid = _rows_of(n, expert_ptr, slot_ptr, kept_ptr, N, K, E, DROPLESS, BLOCK_E)
        if GATE:
            gate = tl.load(gate_ptr + n, mask=valid, other=0.0)
    token = n.to(tl.int64)[:, None] * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (n < N)[:, None] & (d < D)[None, :]
        if J == 1:
            y = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=valid[:, None] & inside, other=0.0)
            if GATE:
                y = gate[:, None] * y.to(gate.dtype)
        else:
            y = tl.zeros((BLOCK_N, BLOCK_D), dtype=WIDE)
            for j in range(J):
                c = tl.where(n < N, n * J + j, N * J)
                row, valid = _rows_of(c, expert_ptr, slot_ptr, kept_ptr, N * J, K, E, DROPLESS, BLOCK_E)
                term = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=valid[:, None] & inside, other=0.0)
                if GATE:
                    term = tl.load(gate_ptr + c, mask=valid, other=0.0)[:, None] * term.to(WIDE)
                y += term
        if SHARED:
            y += tl.load(shared_ptr + token + d[None, :], mask=inside, other=0.0).to(y.dtype)
        tl.store(y_ptr + token + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward_kernel(
    dy_ptr, rows_ptr, expert_ptr, slot_ptr, gate_ptr, kept_ptr, drows_ptr, dgate_ptr,
    zero_programs, parts, C, K, E, D, J: tl.constexpr,
    DROPLESS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """drows[row_nj] = gate_nj * dy_n and dgate_nj = <dy_n, rows[row_nj]>."""
    pid = tl.program_id(0)
    if pid < zero_programs:
        _zero_empty_rows(drows_ptr, kept_ptr, pid, parts, K, E, D, DROPLESS, BLOCK_E, BLOCK_N, BLOCK_D)
    else:
        c = (pid - zero_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, valid = _rows_of(c, expert_ptr, slot_ptr, kept_ptr, C, K, E, DROPLESS, BLOCK_E)
        gate = tl.load(gate_ptr + c, mask=valid, other=0.0)
        token = (c // J).to(tl.int64)[:, None] * D
        dot = tl.zeros((BLOCK_N,), dtype=gate.dtype)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = valid[:, None] & (d < D)[None, :]
            place = row[:, None] * D + d[None, :]
            dy = tl.load(dy_ptr + token + d[None, :], mask=mask, other=0.0).to(gate.dtype)
            value = tl.load(rows_ptr + place, mask=mask, other=0.0).to(gate.dtype)
            dot += tl.sum(dy * value, axis=1)
            tl.store(drows_ptr + place, (gate[:, None] * dy).to(drows_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + c, dot, mask=c < C)


def dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    (tokens, width), choices, experts = x_ND.shape, expert_N.numel(), kept_E.shape[0]
    out = x_ND.new_empty((choices, width) if capacity is None else (experts, capacity, width))
    blocks = _blocks("dispatch", out)
    parts, zero_programs = _zero_programs(out, blocks["BLOCK_N"])
    grid = (zero_programs + triton.cdiv(choices, blocks["BLOCK_N"]),)
    tensors = (x_ND.contiguous(), expert_N.contiguous(), slot_N.contiguous(), kept_E.contiguous(), out)
    sizes, meta = (choices, _slots(out), experts, width), {"J": _per_token(choices, tokens), **_form(out, experts)}
    launch(_dispatch_kernel, grid, *tensors, zero_programs, parts, *sizes, **meta, **blocks)
    return out


def gather(
    rows: Tensor,
    expert_N: Tensor,
    slot_N: Tensor,
    kept_E: Tensor,
    gate_N: Tensor | None = None,
    shared_ND: Tensor | None = None,
) -> Tensor:
    """y_n = shared_n + sum_j gate_nj * rows[row_nj]; ``shared_ND`` only with ``gate_N``."""
    tokens, width, experts = expert_N.shape[0], rows.shape[-1], kept_E.shape[0]
    rows = rows.contiguous()
    y_ND = rows.new_empty(tokens, width)
    blocks = _blocks("gather", rows, _per_token(expert_N.numel(), tokens))
    tensors = (rows, expert_N.contiguous(), slot_N.contiguous(), kept_E.contiguous())
    # The kernel does not access the placeholders for absent tensors.
    gate = rows if gate_N is None else gate_N.contiguous()
    shared = rows if shared_ND is None else shared_ND.contiguous()
    meta = {"J": _per_token(expert_N.numel(), tokens), **_form(rows, experts), **blocks}
    meta |= {"GATE": gate_N is not None, "SHARED": shared_ND is not None}
    meta["WIDE"] = tl.float64 if rows.dtype == torch.float64 else tl.float32
    grid = (triton.cdiv(tokens, blocks["BLOCK_N"]),)
    launch(_gather_kernel, grid, *tensors, gate, shared, y_ND, tokens, _slots(rows), experts, width, **meta)
    return y_ND


def combine_backward(
    dy_ND: Tensor, rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor
) -> tuple[Tensor, Tensor]:
    (tokens, width), choices, experts = dy_ND.shape, expert_N.numel(), kept_E.shape[0]
    drows, dgate_N = rows.new_empty(rows.shape), gate_N.new_empty(gate_N.shape)
    blocks = _blocks("combine_backward", rows, _per_token(choices, tokens))
    parts, zero_programs = _zero_programs(rows, blocks["BLOCK_N"])
    grid = (zero_programs + triton.cdiv(choices, blocks["BLOCK_N"]),)
    inputs = [tensor.contiguous() for tensor in (dy_ND, rows, expert_N, slot_N, gate_N, kept_E)]
    sizes = (zero_programs, parts, choices, _slots(rows), experts, width)
    meta = {"J": _per_token(choices, tokens), **_form(rows, experts), **blocks}
    launch(_combine_backward_kernel, grid, *inputs, drows, dgate_N, *sizes, **meta)
    return drows, dgate_N


def _slots(rows: Tensor) -> int:
    """Rows per region; dropless has a single region of all rows for all experts."""
    return rows.shape[-2]


def _per_token(choices: int, tokens: int) -> int:
    return choices // tokens if tokens else 1


def _form(rows: Tensor, experts: int) -> dict[str, bool | int]:
    dropless = rows.ndim == 2
    return {"DROPLESS": dropless, "BLOCK_E": triton.next_power_of_2(experts) if dropless else 1}


def _zero_programs(rows: Tensor, block_n: int) -> tuple[int, int]:
    """Number of zeroing programs: per region of rows, and in total."""
    parts = triton.cdiv(_slots(rows), ZERO_TILES * block_n)
    return parts, parts * (rows.shape[0] if rows.ndim == 3 else 1)


def _blocks(kernel: str, rows: Tensor, per_token: int = 1) -> dict[str, int]:
    """Block sizes with which each of 128 threads has a few 16-byte accesses in flight and registers to spare."""
    width = triton.next_power_of_2(max(rows.shape[-1], 1))
    elements = 4096 if rows.element_size() <= 4 else 2048
    if kernel == "combine_backward":
        elements //= 2  # two tiles at once
    if per_token > 1:
        elements //= 2  # a sum over rows, or one token for several of them, needs registers of its own
    if rows.shape[-1] % 16:
        elements //= 4  # accesses are element-wise, and each needs a separate address
    # At least two tokens: with one, Triton 3.7's layout pass fails on the dropless float64 backward kernel.
    block_d = min(width, 1024, elements // 2)
    # Dropless needs more registers: the start of each token's expert is a sum over all experts.
    most = 8 if rows.ndim == 2 else 16
    default = {"BLOCK_N": min(elements // block_d, most), "BLOCK_D": block_d, "num_warps": 4}
    size_class = f"{str(rows.dtype).removeprefix('torch.')}-D{min(width, 4096)}"
    return settings(kernel, size_class, default, rows.device)
