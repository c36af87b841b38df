"""The spectral curl on a CPU: plane by plane in cache, with half the arithmetic of full differentiation matrices.

A plane (y, z at fixed x, or x, z at fixed y) is small enough to stay in cache. As in the Triton kernel, planes of the
first kind give u_x and one part of u_z, planes of the second kind u_y and the other part. In each plane both axes are
folded into sums and differences of their halves, which turns the circulant matrix [[C0, C1], [C1, C0]] into two blocks
of half the size, C0 + C1 and C0 - C1. Planes are distributed over as many threads as torch uses. One thread computes a
whole plane, so the result does not depend on the number of threads.

Shapes: X Y Z space, R rows and C columns of a plane, H half of either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from shodh_moe.kernels.compiled import compiled, parallel_loops
from shodh_moe.kernels.differentiation import cached_matrix

# The full matrices of `spectral_curl` are faster for shorter axes (measured at 32; at 64 this form is faster).
MINIMUM = 64
PARTS = 8  # parts of the planes per thread, to balance the load


@compiled()
def _line(field: Any, fixed: int, row: int, rows_are_x: bool) -> Any:
    """A row of a plane, contiguous along z."""
    return field[row, fixed] if rows_are_x else field[fixed, row]


@compiled()
def _fold(field: Any, fixed: int, rows_are_x: bool, out: Any) -> None:
    """Fold a plane: out[0] are sums and out[1] differences over rows; over columns, the halves of the last axis are."""
    half_r, half_c = out.shape[1], out.shape[2] // 2
    for r in range(half_r):
        near = _line(field, fixed, r, rows_are_x)
        far = _line(field, fixed, r + half_r, rows_are_x)
        sums, differences = out[0, r], out[1, r]
        for c in range(half_c):
            left_sum, left_difference = near[c] + far[c], near[c] - far[c]
            right_sum, right_difference = near[c + half_c] + far[c + half_c], near[c + half_c] - far[c + half_c]
            sums[c] = left_sum + right_sum
            sums[c + half_c] = left_sum - right_sum
            differences[c] = left_difference + right_difference
            differences[c + half_c] = left_difference - right_difference


@compiled()
def _unfold(folded: Any, field: Any, fixed: int, rows_are_x: bool, sign: Any, mean: Any, accumulate: bool) -> None:
    """Unfold a plane and set that of ``field`` to sign * unfolded + mean; with ``accumulate``, add sign * unfolded."""
    half_r, half_c = folded.shape[1], folded.shape[2] // 2
    for r in range(half_r):
        near = _line(field, fixed, r, rows_are_x)
        far = _line(field, fixed, r + half_r, rows_are_x)
        sums, differences = folded[0, r], folded[1, r]
        if not accumulate:
            near[:] = mean
            far[:] = mean
        for c in range(half_c):
            left_sum, right_sum = sums[c] + sums[c + half_c], sums[c] - sums[c + half_c]
            left_difference = differences[c] + differences[c + half_c]
            right_difference = differences[c] - differences[c + half_c]
            near[c] += sign * (left_sum + left_difference)
            near[c + half_c] += sign * (right_sum + right_difference)
            far[c] += sign * (left_sum - left_difference)
            far[c + half_c] += sign * (right_sum - right_difference)


@compiled()
def _add_product(a: Any, b: Any, out: Any, first: int) -> None:
    """out += a @ b, with the columns of ``a`` and ``out`` from ``first`` on. Four rows share each load of b."""
    inner, columns = b.shape
    rows = out.shape[0]
    for r in range(0, rows - rows % 4, 4):
        a0, a1, a2, a3 = a[r][first:], a[r + 1][first:], a[r + 2][first:], a[r + 3][first:]
        out0, out1, out2, out3 = out[r][first:], out[r + 1][first:], out[r + 2][first:], out[r + 3][first:]
        for k in range(0, inner - inner % 4, 4):
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            a00, a01, a02, a03 = a0[k], a0[k + 1], a0[k + 2], a0[k + 3]
            a10, a11, a12, a13 = a1[k], a1[k + 1], a1[k + 2], a1[k + 3]
            a20, a21, a22, a23 = a2[k], a2[k + 1], a2[k + 2], a2[k + 3]
            a30, a31, a32, a33 = a3[k], a3[k + 1], a3[k + 2], a3[k + 3]
            for c in range(columns):
                v0, v1, v2, v3 = b0[c], b1[c], b2[c], b3[c]
                out0[c] += a00 * v0 + a01 * v1 + a02 * v2 + a03 * v3
                out1[c] += a10 * v0 + a11 * v1 + a12 * v2 + a13 * v3
                out2[c] += a20 * v0 + a21 * v1 + a22 * v2 + a23 * v3
                out3[c] += a30 * v0 + a31 * v1 + a32 * v2 + a33 * v3
        for k in range(inner - inner % 4, inner):
            for i in range(r, r + 4):
                _add_row(a[i][first:][k], b[k], out[i][first:])
    for r in range(rows - rows % 4, rows):
        for k in range(inner):
            _add_row(a[r][first:][k], b[k], out[r][first:])


@compiled()
def _add_row(factor: Any, source: Any, target: Any) -> None:
    for c in range(len(source)):
        target[c] += factor * source[c]


@compiled()
def _planes(a: Any, u: Any, mean: Any, d_r: Any, d_zt: Any, rows_are_x: bool, first: int, last: int) -> None:
    """Compute planes first..last-1: out1 = +-(D_R P - Q D_z^T) + mean, out2 = -+ D_R S + mean (added for x rows)."""
    half_c = d_zt.shape[1]
    shape = (2, d_r.shape[1], 2 * half_c)
    p, q, s = np.empty(shape, a.dtype), np.empty(shape, a.dtype), np.empty(shape, a.dtype)
    out1, out2 = np.empty(shape, a.dtype), np.empty(shape, a.dtype)
    one, zero = d_r.dtype.type(1), d_r.dtype.type(0)
    for fixed in range(first, last):
        _fold(a[2], fixed, rows_are_x, p)
        _fold(a[0] if rows_are_x else a[1], fixed, rows_are_x, q)
        _fold(a[1] if rows_are_x else a[0], fixed, rows_are_x, s)
        out1[:] = zero
        out2[:] = zero
        for rs in range(2):
            _add_product(d_r[rs], p[rs], out1[rs], 0)
            _add_product(d_r[rs], s[rs], out2[rs], 0)
            _add_product(q[rs], d_zt[0], out1[rs], 0)
            _add_product(q[rs], d_zt[1], out1[rs], half_c)
        if rows_are_x:
            _unfold(out1, u[1], fixed, True, -one, mean[1], False)
            _unfold(out2, u[2], fixed, True, one, zero, True)
        else:
            _unfold(out1, u[0], fixed, False, one, mean[0], False)
            _unfold(out2, u[2], fixed, False, -one, mean[2], False)


@parallel_loops
def _all_planes(a: Any, u: Any, mean: Any, d_r: Any, d_zt: Any, rows_are_x: bool, planes: int, parts: int) -> None:
    for part in numba.prange(parts):
        _planes(a, u, mean, d_r, d_zt, rows_are_x, planes * part // parts, planes * (part + 1) // parts)


@lru_cache(maxsize=64)
def _blocks(size: int, spacing: float, dtype: torch.dtype, adjoint: bool, columns: bool) -> np.ndarray:
    """(C0 + C1, C0 - C1) / 4, [2, H, H], of D, or of -D^T for columns. Folding and unfolding two axes multiply by 4."""
    d = cached_matrix(size, "spectral", spacing, torch.float64, torch.device("cpu"), adjoint)
    c0, c1 = d[: size // 2].chunk(2, dim=1)
    both = torch.stack((c0 + c1, c0 - c1)) / 4
    return (-both.transpose(1, 2) if columns else both).to(dtype).contiguous().numpy()


def fits(field: Tensor) -> bool:
    """Whether `curl` supports this CPU field and is faster than the reference for it."""
    wide = field.dtype in (torch.float32, torch.float64)
    return wide and all(n % 2 == 0 and n >= MINIMUM for n in field.shape[2:])


def curl(a_B3XYZ: Tensor, mean_B3: Tensor | None, spacing: list[float], adjoint: bool) -> Tensor:
    """`spectral_curl.curl` of a contiguous float32 or float64 field with even X, Y and Z."""
    u_B3XYZ = torch.empty_like(a_B3XYZ)
    a, u = a_B3XYZ.detach().numpy(), u_B3XYZ.numpy()
    mean = np.zeros(a.shape[:2], a.dtype) if mean_B3 is None else mean_B3.to(a_B3XYZ.dtype).detach().numpy()
    d_x, d_y = (_blocks(a.shape[2 + i], spacing[i], a_B3XYZ.dtype, adjoint, False) for i in range(2))
    d_zt = _blocks(a.shape[4], spacing[2], a_B3XYZ.dtype, adjoint, True)
    parts = PARTS * torch.get_num_threads()
    for b in range(len(a)):
        for rows_are_x, d_r in ((False, d_y), (True, d_x)):  # in order: the second adds to the first's u_z
            planes = a.shape[3] if rows_are_x else a.shape[2]
            _all_planes(a[b], u[b], mean[b], d_r, d_zt, rows_are_x, planes, parts)
    return u_B3XYZ
