"""Small device functions shared by the routing kernels of `gating_triton` and `gating_select_triton`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_hot(expert_N, live_N, column_E):
    """[BLOCK_N, E_PAD] int32: 1 where token n exists and chose expert e."""
    return ((column_E[None, :] == expert_N[:, None]) & live_N[:, None]).to(tl.int32)


@triton.jit
def pick(value_NE, chosen_NE):
    """[BLOCK_N]: the value in each row's one-hot column, 0 for a row of zeros."""
    return tl.sum(value_NE * chosen_NE, axis=1)


@triton.jit
def count_digit(histogram_ptr, expert_N, key_N, live_N, SHIFT: tl.constexpr, DIGIT: tl.constexpr):
    """Count each token in its expert's bucket for the digit. These are integer sums, so their order does not matter."""
    digit_N = (key_N >> SHIFT) & ((1 << DIGIT) - 1)
    tl.atomic_add(histogram_ptr + (expert_N << DIGIT) + digit_N, 1, mask=live_N, sem="relaxed")


@triton.jit
def sum_of_chunks(count_ptr, first, last, column_E, E: tl.constexpr, E_PAD: tl.constexpr):
    """[E_PAD]: sum of the rows first..last-1 of a [G, E] array, in a fixed order."""
    total_E = tl.zeros([E_PAD], count_ptr.dtype.element_ty)
    for start in range(first, last, 16):
        row = start + tl.arange(0, 16)
        at = count_ptr + row[:, None] * E + column_E[None, :]
        total_E += tl.sum(tl.load(at, mask=(row[:, None] < last) & (column_E[None, :] < E), other=0), axis=0)
    return total_E


@triton.jit
def totals(
    count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr, routed_ptr, kept_ptr, balance_ptr, z_ptr, mean_p_ptr,
    first_broken_ptr, tokens, capacity, column_E,
    chunks: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, G_PAD: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Sum up all chunks and store choices and mean probability per expert, both losses, and the first token without a
    softmax."""
    live_E = column_E < E
    routed_E = sum_of_chunks(count_ptr, 0, chunks, column_E, E, E_PAD)
    p_sum_E = sum_of_chunks(p_sum_ptr, 0, chunks, column_E, E, E_PAD)
    tl.store(routed_ptr + column_E, routed_E.to(tl.int64), mask=live_E)
    tl.store(kept_ptr + column_E, tl.minimum(routed_E, capacity).to(tl.int64), mask=live_E)
    tl.store(mean_p_ptr + column_E, p_sum_E / tokens, mask=live_E)
    tl.store(balance_ptr, E * tl.sum((p_sum_E / tokens) * (routed_E.to(tl.float32) / (tokens * J)), axis=0))
    chunk = tl.arange(0, G_PAD)
    z_sum_G = tl.load(z_sum_ptr + chunk, mask=chunk < chunks, other=0.0)
    tl.store(z_ptr, tl.sum(z_sum_G, axis=0) / tokens)
    broken_G = tl.load(broken_ptr + chunk, mask=chunk < chunks, other=0x7FFFFFFF)
    tl.store(first_broken_ptr, tl.min(broken_G, axis=0))
