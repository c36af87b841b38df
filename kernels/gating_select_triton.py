"""Slots in probability order: keep each expert's K most probable tokens, ties by position, without sorting.

Gates lie in [0, 1], so their float32 bits, read as integers below 2^30, have the same order. Three histograms, each
over ten bits, find the bits of each expert's K-th largest gate, the threshold (a radix select). A token is kept if its
gate is above the threshold, or equal to it and early enough. The histograms are filled by atomic integer additions,
whose result does not depend on their order.

Shapes: N tokens, E experts, K slots per expert, G chunks of tokens, J experts per token. With J > 1 each choice is
treated as a token of its own: choices are in the order of the tokens, and no expert has two of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels.backend import launch
from shodh_moe.kernels.gating_parts_triton import count_digit, one_hot, pick, sum_of_chunks, totals

DIGIT = 10  # bits
PASSES = 3
FIRST_SHIFT = DIGIT * (PASSES - 1)


@triton.jit
def _histogram_kernel(
    expert_ptr, gate_ptr, prefix_ptr, histogram_ptr, tokens,
    SHIFT: tl.constexpr, DIGIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Count, for each expert, the next digit of the gates whose leading digits are the expert's prefix."""
    token_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_N = token_N < tokens
    expert_N = tl.load(expert_ptr + token_N, mask=live_N, other=0)
    key_N = tl.load(gate_ptr + token_N, mask=live_N, other=0.0).to(tl.int32, bitcast=True)
    live_N = live_N & ((key_N >> (SHIFT + DIGIT)) == tl.load(prefix_ptr + expert_N, mask=live_N, other=-1))
    count_digit(histogram_ptr, expert_N, key_N, live_N, SHIFT, DIGIT)


@triton.jit
def _select_kernel(
    histogram_ptr, prefix_ptr, need_ptr, capacity, DIGIT: tl.constexpr, FIRST: tl.constexpr, E: tl.constexpr
):
    """Extend the expert's prefix by the next digit of its K-th largest gate; -1 if it has fewer than K tokens."""
    expert = tl.program_id(0)
    prefix = 0
    need = capacity
    if not FIRST:
        prefix = tl.load(prefix_ptr + expert)
        need = tl.load(need_ptr + expert)
    digit = tl.arange(0, 1 << DIGIT)
    count = tl.load(histogram_ptr + (expert << DIGIT) + digit)
    above = tl.sum(count, axis=0) - tl.cumsum(count, axis=0)
    here = (above < need) & (above + count >= need)
    found = tl.sum(here.to(tl.int32), axis=0)
    extended = (prefix << DIGIT) + tl.sum(tl.where(here, digit, 0), axis=0)
    tl.store(prefix_ptr + expert, tl.where(found > 0, extended, -1))
    tl.store(need_ptr + expert, need - tl.sum(tl.where(here, above, 0), axis=0))


@triton.jit
def _load_tile(expert_ptr, gate_ptr, threshold_ptr, token_N, tokens, column_E):
    """One-hot experts of the tokens above their expert's threshold, and of those equal to it."""
    live_N = token_N < tokens
    expert_N = tl.load(expert_ptr + token_N, mask=live_N, other=0).to(tl.int32)
    key_N = tl.load(gate_ptr + token_N, mask=live_N, other=0.0).to(tl.int32, bitcast=True)
    threshold_N = tl.load(threshold_ptr + expert_N, mask=live_N, other=0)
    above = one_hot(expert_N, live_N & (key_N > threshold_N), column_E)
    equal = one_hot(expert_N, live_N & (key_N == threshold_N), column_E)
    return live_N, expert_N, above, equal


@triton.jit
def _count_kernel(
    expert_ptr, gate_ptr, threshold_ptr, above_ptr, equal_ptr, tokens, tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column_E = tl.arange(0, E_PAD)
    above_E = tl.zeros([E_PAD], tl.int32)
    equal_E = tl.zeros([E_PAD], tl.int32)
    for tile in range(tiles):
        token_N = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        _, _, above, equal = _load_tile(expert_ptr, gate_ptr, threshold_ptr, token_N, tokens, column_E)
        above_E += tl.sum(above, axis=0)
        equal_E += tl.sum(equal, axis=0)
    tl.store(above_ptr + chunk * E + column_E, above_E, mask=column_E < E)
    tl.store(equal_ptr + chunk * E + column_E, equal_E, mask=column_E < E)


@triton.jit
def _slot_kernel(
    expert_ptr, gate_ptr, slot_ptr, threshold_ptr, need_ptr, above_ptr, equal_ptr,
    count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr, routed_ptr, kept_ptr, balance_ptr, z_ptr, mean_p_ptr,
    first_broken_ptr, tokens, tiles, capacity, chunks: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    G_PAD: tl.constexpr, J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Give each kept token its slot, the number of kept tokens before it: those above the threshold, and the first
    ``need`` equal to it."""
    chunk = tl.program_id(0)
    column_E = tl.arange(0, E_PAD)
    if chunk == chunks:
        totals(
            count_ptr, p_sum_ptr, z_sum_ptr, broken_ptr, routed_ptr, kept_ptr, balance_ptr, z_ptr, mean_p_ptr,
            first_broken_ptr, tokens // J, capacity, column_E, chunks, E, E_PAD, G_PAD, J,
        )  # fmt: skip
    else:
        above_E = sum_of_chunks(above_ptr, 0, chunk, column_E, E, E_PAD)
        equal_E = sum_of_chunks(equal_ptr, 0, chunk, column_E, E, E_PAD)
        need_E = tl.load(need_ptr + column_E, mask=column_E < E, other=0)
        for tile in range(tiles):
            token_N = (chunk * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
            live_N, expert_N, above, equal = _load_tile(expert_ptr, gate_ptr, threshold_ptr, token_N, tokens, column_E)
            chosen = one_hot(expert_N, live_N, column_E)
            above_N = pick(tl.cumsum(above, axis=0) - above + above_E[None, :], chosen)
            equal_N = pick(tl.cumsum(equal, axis=0) - equal + equal_E[None, :], chosen)
            need_N = pick(need_E[None, :], chosen)
            kept_N = (tl.sum(above, axis=1) > 0) | ((tl.sum(equal, axis=1) > 0) & (equal_N < need_N))
            slot_N = tl.where(kept_N, above_N + tl.minimum(equal_N, need_N), -1)
            tl.store(slot_ptr + token_N, slot_N.to(tl.int64), mask=live_N)
            above_E += tl.sum(above, axis=0)
            equal_E += tl.sum(equal, axis=0)


def histograms(experts: int, device: torch.device) -> Tensor:
    """Zeroed histograms, int32 [passes, E, 2^DIGIT]."""
    return torch.zeros((PASSES, experts, 1 << DIGIT), dtype=torch.int32, device=device)


def assign_slots(
    expert_N: Tensor, gate_N: Tensor, slot_N: Tensor, histogram: Tensor, sums: tuple[Tensor, ...],
    tiles: int, capacity: int, sizes: dict[str, int],
) -> None:  # fmt: skip
    """Write ``slot_N`` and the results of `totals` in seven launches. ``sizes``: block sizes and number of chunks."""
    tokens, experts, chunks = expert_N.numel(), sizes["E"], sizes["chunks"]
    tiles *= sizes["J"]
    prefix_E, need_E = histogram.new_empty(2, experts)
    above_GE, equal_GE = histogram.new_empty(2, chunks, experts)
    for i in range(PASSES):
        if i > 0:  # the routing launch has filled the first histogram
            launch(
                _histogram_kernel, (triton.cdiv(tokens, 512),), expert_N, gate_N, prefix_E, histogram[i], tokens,
                SHIFT=FIRST_SHIFT - DIGIT * i, DIGIT=DIGIT, BLOCK_N=512, num_warps=4,
            )  # fmt: skip
        launch(
            _select_kernel, (experts,), histogram[i], prefix_E, need_E, capacity, DIGIT=DIGIT, FIRST=i == 0,
            E=experts, num_warps=4,
        )  # fmt: skip
    tile_sizes = {key: sizes[key] for key in ("E", "E_PAD", "BLOCK_N", "num_warps")}
    launch(_count_kernel, (chunks,), expert_N, gate_N, prefix_E, above_GE, equal_GE, tokens, tiles, **tile_sizes)
    launch(
        _slot_kernel, (chunks + 1,), expert_N, gate_N, slot_N, prefix_E, need_E, above_GE, equal_GE, *sums,
        tokens, tiles, capacity, **sizes,
    )  # fmt: skip
