"""The plane kernel of `kernels.spectral_curl_triton` for even sizes, with half the arithmetic.

A circulant matrix of even size is [[C0, C1], [C1, C0]], so with f+ = f_near + f_far and f- = f_near - f_far, the sum
and the difference of the halves of f,

    (D f)_near = D+ f+ + D- f-        (D f)_far = D+ f+ - D- f-        D+ = (C0 + C1) / 2,  D- = (C0 - C1) / 2

needs two products of half size instead of four. A program computes four tiles of each output: rows r and r + R/2,
columns c and c + Z/2.

Shapes: R rows and Z columns of a plane, H half of either.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels.differentiation import cached_matrix


@lru_cache(maxsize=64)
def folded_matrix(size: int, spacing: float, dtype: torch.dtype, device: torch.device, adjoint: bool) -> Tensor:
    """(D+, D-) of the spectral operator, [2, H, H], or of -D^T if ``adjoint``."""
    with torch.inference_mode(False):
        d = cached_matrix(size, "spectral", spacing, torch.float64, torch.device("cpu"), adjoint)
        c0, c1 = d[: size // 2].chunk(2, dim=1)
        return torch.stack((c0 + c1, c0 - c1)).div(2).to(device=device, dtype=dtype)


@triton.jit
def _both(ptr, step, inside, DTYPE: tl.constexpr):
    """Sum and difference of the tiles at ``ptr`` and ``ptr + step``."""
    near = tl.load(ptr, mask=inside, other=0.0).to(DTYPE)
    far = tl.load(ptr + step, mask=inside, other=0.0).to(DTYPE)
    return near + far, near - far


@triton.jit
def _along_columns(
    plus, minus, low_plus, low_minus, f_ptr, d_ptr, down, columns, live, c,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f D^T in four tiles: left and right columns at the rows of ``f_ptr``, then at those of ``f_ptr + down``."""
    k_row = tl.arange(0, BLOCK_K)[None, :]
    k_column = tl.arange(0, BLOCK_K)[:, None]
    for k in range(0, columns, BLOCK_K):
        inside = (k + k_column < columns) & (c < columns)
        at = d_ptr + (k + k_column) * columns + c
        d_plus = tl.load(at, mask=inside, other=0.0)
        d_minus = tl.load(at + columns * columns, mask=inside, other=0.0)
        inside = live & (k + k_row < columns)
        f_plus, f_minus = _both(f_ptr + k + k_row, columns, inside, plus.dtype)
        plus = tl.dot(f_plus, d_plus, plus, input_precision=PRECISION, out_dtype=plus.dtype)
        minus = tl.dot(f_minus, d_minus, minus, input_precision=PRECISION, out_dtype=plus.dtype)
        f_plus, f_minus = _both(f_ptr + down + k + k_row, columns, inside, plus.dtype)
        low_plus = tl.dot(f_plus, d_plus, low_plus, input_precision=PRECISION, out_dtype=plus.dtype)
        low_minus = tl.dot(f_minus, d_minus, low_minus, input_precision=PRECISION, out_dtype=plus.dtype)
    return plus + minus, plus - minus, low_plus + low_minus, low_plus - low_minus


@triton.jit
def _along_rows(
    plus, minus, right_plus, right_minus, f_ptr, d_ptr, row_stride, rows, columns, r, c,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add D+ f+ and D- f- for the left and the right columns."""
    k_row = tl.arange(0, BLOCK_K)[None, :]
    k_column = tl.arange(0, BLOCK_K)[:, None]
    down = rows * row_stride  # from a row to its partner
    for k in range(0, rows, BLOCK_K):
        inside = (r < rows) & (k + k_row < rows)
        at = d_ptr + r * rows + k + k_row
        d_plus = tl.load(at, mask=inside, other=0.0)
        d_minus = tl.load(at + rows * rows, mask=inside, other=0.0)
        inside = (k + k_column < rows) & (c < columns)
        at = f_ptr + (k + k_column) * row_stride + c
        f_plus, f_minus = _both(at, down, inside, plus.dtype)
        plus = tl.dot(d_plus, f_plus, plus, input_precision=PRECISION, out_dtype=plus.dtype)
        minus = tl.dot(d_minus, f_minus, minus, input_precision=PRECISION, out_dtype=plus.dtype)
        f_plus, f_minus = _both(at + columns, down, inside, plus.dtype)
        right_plus = tl.dot(d_plus, f_plus, right_plus, input_precision=PRECISION, out_dtype=plus.dtype)
        right_minus = tl.dot(d_minus, f_minus, right_minus, input_precision=PRECISION, out_dtype=plus.dtype)
    return plus, minus, right_plus, right_minus


@triton.jit
def _store(ptr, step, inside, plus, minus, mean, SIGN: tl.constexpr, ACCUMULATE: tl.constexpr):
    near = SIGN * (plus + minus) + mean
    far = SIGN * (plus - minus) + mean
    if ACCUMULATE:
        near += tl.load(ptr, mask=inside, other=0.0)
        far += tl.load(ptr + step, mask=inside, other=0.0)
    tl.store(ptr, near, mask=inside)
    tl.store(ptr + step, far, mask=inside)


@triton.jit
def folded_plane_kernel(
    p_ptr, q_ptr, s_ptr,
    d_r_ptr,  # [2, H, H]
    d_zt_ptr,  # [2, H, H], transposed
    mean1_ptr, mean2_ptr, out1_ptr, out2_ptr,
    rows, columns, row_stride, plane_stride, in_batch_stride, out_batch_stride,
    HAS_P: tl.constexpr, HAS_Q: tl.constexpr, HAS_S: tl.constexpr, HAS_MEAN: tl.constexpr, ACCUMULATE: tl.constexpr,
    SIGN_1: tl.constexpr, SIGN_Q: tl.constexpr, SIGN_2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Like `plane_kernel`, for even ``rows`` and ``columns`` (fast for multiples of 16)."""
    dtype: tl.constexpr = d_r_ptr.dtype.element_ty
    rows = rows // 2
    columns = columns // 2
    down = rows * row_stride
    tiles_c = tl.cdiv(columns, BLOCK_C)
    r = (tl.program_id(0) // tiles_c) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    plane = tl.program_id(1) * plane_stride
    batch = tl.program_id(2).to(tl.int64)
    source = batch * in_batch_stride + plane
    out1_ptr += batch * out_batch_stride + plane
    out2_ptr += batch * out_batch_stride + plane
    target = r * row_stride + c
    inside = (r < rows) & (c < columns)
    zero = tl.zeros((BLOCK_R, BLOCK_C), dtype)

    if HAS_P or HAS_Q:
        left_plus, left_minus, right_plus, right_minus = zero, zero, zero, zero
        if HAS_Q:
            q = q_ptr + source + r * row_stride
            left, right, low_left, low_right = _along_columns(
                zero, zero, zero, zero, q, d_zt_ptr, down, columns, r < rows, c, PRECISION, BLOCK_K
            )
            # Fold the rows for the products below; folding and unfolding together double the values.
            left_plus = (left + low_left) * (SIGN_Q * 0.5)
            left_minus = (left - low_left) * (SIGN_Q * 0.5)
            right_plus = (right + low_right) * (SIGN_Q * 0.5)
            right_minus = (right - low_right) * (SIGN_Q * 0.5)
        if HAS_P:
            left_plus, left_minus, right_plus, right_minus = _along_rows(
                left_plus, left_minus, right_plus, right_minus,
                p_ptr + source, d_r_ptr, row_stride, rows, columns, r, c, PRECISION, BLOCK_K,
            )  # fmt: skip
        mean = tl.load(mean1_ptr + 3 * batch) if HAS_MEAN else 0.0
        _store(out1_ptr + target, down, inside, left_plus, left_minus, mean, SIGN_1, False)
        _store(out1_ptr + target + columns, down, inside, right_plus, right_minus, mean, SIGN_1, False)
    if HAS_S:
        left_plus, left_minus, right_plus, right_minus = _along_rows(
            zero, zero, zero, zero, s_ptr + source, d_r_ptr, row_stride, rows, columns, r, c, PRECISION, BLOCK_K
        )
        # If the output is accumulated, the previous launch has added the mean.
        mean = tl.load(mean2_ptr + 3 * batch) if HAS_MEAN and not ACCUMULATE else 0.0
        _store(out2_ptr + target, down, inside, left_plus, left_minus, mean, SIGN_2, ACCUMULATE)
        _store(out2_ptr + target + columns, down, inside, right_plus, right_minus, mean, SIGN_2, ACCUMULATE)
