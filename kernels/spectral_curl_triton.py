"""Triton kernels of the spectral curl and divergence: matrix products over the planes of the grid.

A plane has rows along R (y at fixed x, or x at fixed y) and contiguous columns along z. With D_R and D_z the
differentiation matrices of the two axes, one program computes a tile of

    out1 = SIGN_1 * (D_R P + SIGN_Q * Q D_z^T) + mean        out2 (+)= SIGN_2 * D_R S + mean

so a curl takes two launches, and u_z, to which both contribute, is the only field that is written twice:

    planes (y, z):  u_x = D_y A_z - A_y D_z^T + m_x         u_z  = -D_y A_x + m_z
    planes (x, z):  u_y = -(D_x A_z - A_x D_z^T) + m_y      u_z += D_x A_y

float32 products run as tf32x3 on NVIDIA: three tensor core products of the high and low halves of the operands,
which keeps float32 accuracy (tested in tests/kernels/test_spectral_curl.py). bfloat16 and float16 tiles are converted
to float32 first. If both sizes of a plane are multiples of 16, the kernel of `kernels.spectral_fold_triton` is used,
which needs half the arithmetic.

Shapes: B batch, 3 vector components, X Y Z space, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels import stencil_triton
from shodh_moe.kernels.backend import dot_precision, launch, settings
from shodh_moe.kernels.differentiation import cached_matrix
from shodh_moe.kernels.spectral_fold_triton import folded_matrix, folded_plane_kernel

# Block sizes by dtype of the result: the largest without register spills on sm_80, sm_90, sm_100 and gfx942.
PLAIN = {
    "float32": {"BLOCK_R": 64, "BLOCK_C": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    "float64": {"BLOCK_R": 32, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
}
FOLDED = {
    "float32": {"BLOCK_R": 64, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    "float64": {"BLOCK_R": 16, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def _add_product(
    acc, a_ptr, a_stride, b_ptr, b_stride, rows, columns, inner, r, c, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + A B at rows r and columns c, for A [rows, inner] and B [inner, columns] with these strides of rows."""
    k_row = tl.arange(0, BLOCK_K)[None, :]
    k_column = tl.arange(0, BLOCK_K)[:, None]
    for k in range(0, inner, BLOCK_K):
        inside = (r < rows) & (k + k_row < inner)
        a = tl.load(a_ptr + r * a_stride + k + k_row, mask=inside, other=0.0).to(acc.dtype)
        inside = (k + k_column < inner) & (c < columns)
        b = tl.load(b_ptr + (k + k_column) * b_stride + c, mask=inside, other=0.0).to(acc.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def plane_kernel(
    p_ptr, q_ptr, s_ptr,
    d_r_ptr,  # [R, R]
    d_zt_ptr,  # [Z, Z], D_z transposed
    mean1_ptr, mean2_ptr, out1_ptr, out2_ptr,
    rows, columns, row_stride, plane_stride, in_batch_stride, out_batch_stride,
    HAS_P: tl.constexpr, HAS_Q: tl.constexpr, HAS_S: tl.constexpr, HAS_MEAN: tl.constexpr, ACCUMULATE: tl.constexpr,
    SIGN_1: tl.constexpr, SIGN_Q: tl.constexpr, SIGN_2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of out1 and of out2. Pointers to means [B, 3] are offset to their component."""
    dtype: tl.constexpr = d_r_ptr.dtype.element_ty
    # Neighbouring programs work on the same plane, so they find its tiles in the L2 cache.
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

    if HAS_P or HAS_Q:
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        if HAS_Q:
            acc = _add_product(
                acc, q_ptr + source, row_stride, d_zt_ptr, columns, rows, columns, columns, r, c, PRECISION, BLOCK_K
            )
            acc *= SIGN_Q
        if HAS_P:
            acc = _add_product(
                acc, d_r_ptr, rows, p_ptr + source, row_stride, rows, columns, rows, r, c, PRECISION, BLOCK_K
            )
        acc *= SIGN_1
        if HAS_MEAN:
            acc += tl.load(mean1_ptr + 3 * batch)
        tl.store(out1_ptr + target, acc, mask=inside)
    if HAS_S:
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        acc = _add_product(
            acc, d_r_ptr, rows, s_ptr + source, row_stride, rows, columns, rows, r, c, PRECISION, BLOCK_K
        )
        acc *= SIGN_2
        if ACCUMULATE:  # add to the result of the previous launch, which includes the mean
            acc += tl.load(out2_ptr + target, mask=inside, other=0.0)
        elif HAS_MEAN:
            acc += tl.load(mean2_ptr + 3 * batch)
        tl.store(out2_ptr + target, acc, mask=inside)


class Product(NamedTuple):
    """One launch: the components P, Q, S of the input (None if absent) with their signs."""

    axis: int  # of the rows: 0 is x, 1 is y
    p: Tensor | None = None
    q: Tensor | None = None
    s: Tensor | None = None
    out1: Tensor | None = None
    out2: Tensor | None = None
    mean1: Tensor | None = None
    mean2: Tensor | None = None
    sign_1: int = 1
    sign_q: int = 1
    sign_2: int = 1
    accumulate: bool = False


def _launch(product: Product, spacing: list[float], adjoint: bool) -> None:
    """Launch a product. Its fields are [B, X, Y, Z], components of contiguous fields; inputs have equal strides."""
    inputs = [f for f in (product.p, product.q, product.s) if f is not None]
    outputs = [f for f in (product.out1, product.out2) if f is not None]
    like, out = inputs[0], outputs[0]
    batch, x, y, z = like.shape
    rows, planes = (x, y) if product.axis == 0 else (y, x)
    row_stride, plane_stride = (y * z, z) if product.axis == 0 else (z, y * z)
    fold = rows % 16 == 0 and z % 16 == 0  # then halves of lines are aligned too; otherwise registers would spill
    name, defaults = ("spectral_fold", FOLDED) if fold else ("spectral_curl", PLAIN)
    dtype = str(out.dtype).removeprefix("torch.")
    block = settings(name, dtype, defaults[dtype], out.device)
    halves = 2 if fold else 1
    tiles = triton.cdiv(rows // halves, block["BLOCK_R"]) * triton.cdiv(z // halves, block["BLOCK_C"])
    means = (out if product.mean1 is None else product.mean1, out if product.mean2 is None else product.mean2)
    launch(
        folded_plane_kernel if fold else plane_kernel,
        (tiles, planes, batch),
        *(like if f is None else f for f in (product.p, product.q, product.s)),
        _matrix(rows, spacing[product.axis], out, adjoint, fold),
        _matrix(z, spacing[2], out, not adjoint, fold),  # -D^T: its sign goes into SIGN_Q
        *means,
        *(out if f is None else f for f in (product.out1, product.out2)),
        rows,
        z,
        row_stride,
        plane_stride,
        like.stride(0),
        out.stride(0),
        HAS_P=product.p is not None,
        HAS_Q=product.q is not None,
        HAS_S=product.s is not None,
        HAS_MEAN=product.mean1 is not None,
        ACCUMULATE=product.accumulate,
        SIGN_1=product.sign_1,
        SIGN_Q=-product.sign_q,
        SIGN_2=product.sign_2,
        PRECISION=dot_precision(out.dtype),
        **block,
    )


def _matrix(size: int, spacing: float, out: Tensor, adjoint: bool, fold: bool) -> Tensor:
    if fold:
        return folded_matrix(size, spacing, out.dtype, out.device, adjoint)
    return cached_matrix(size, "spectral", spacing, out.dtype, out.device, adjoint)


def _result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def curl(potential_B3XYZ: Tensor, mean_B3: Tensor | None, operator: str, spacing: list[float], adjoint: bool) -> Tensor:
    """`spectral_curl.curl` for arguments that have been checked."""
    potential_B3XYZ = potential_B3XYZ.contiguous()
    u_B3XYZ = _result(potential_B3XYZ, potential_B3XYZ.shape)
    mean_B3 = None if mean_B3 is None else mean_B3.to(u_B3XYZ.dtype).contiguous()
    if operator != "spectral":
        stencil_triton.curl(potential_B3XYZ, mean_B3, u_B3XYZ, operator, spacing, adjoint)
        return u_B3XYZ
    a_x, a_y, a_z = potential_B3XYZ.unbind(1)
    u_x, u_y, u_z = u_B3XYZ.unbind(1)
    m_x, m_y, m_z = (None, None, None) if mean_B3 is None else mean_B3.unbind(1)
    _launch(
        Product(1, p=a_z, q=a_y, s=a_x, out1=u_x, out2=u_z, mean1=m_x, mean2=m_z, sign_q=-1, sign_2=-1),
        spacing,
        adjoint,
    )
    _launch(
        Product(0, p=a_z, q=a_x, s=a_y, out1=u_y, out2=u_z, mean1=m_y, sign_1=-1, sign_q=-1, accumulate=True),
        spacing,
        adjoint,
    )
    return u_B3XYZ


def divergence(u_B3XYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    """`spectral_curl.divergence` for arguments that have been checked."""
    u_B3XYZ = u_B3XYZ.contiguous()
    out_BXYZ = _result(u_B3XYZ, (u_B3XYZ.shape[0], *u_B3XYZ.shape[2:]))
    if operator != "spectral":
        stencil_triton.divergence(u_B3XYZ, out_BXYZ, operator, spacing)
        return out_BXYZ
    u_x, u_y, u_z = u_B3XYZ.unbind(1)
    _launch(Product(1, p=u_y, q=u_z, out1=out_BXYZ), spacing, False)
    _launch(Product(0, s=u_x, out2=out_BXYZ, accumulate=True), spacing, False)
    return out_BXYZ


def divergence_backward(g_BXYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    """The transposed divergence, du_i = D_i^T g: [B, 3, X, Y, Z]."""
    g_BXYZ = g_BXYZ.contiguous()
    du_B3XYZ = _result(g_BXYZ, (g_BXYZ.shape[0], 3, *g_BXYZ.shape[1:]))
    if operator != "spectral":
        stencil_triton.divergence_backward(g_BXYZ, du_B3XYZ, operator, spacing)
        return du_B3XYZ
    du_x, du_y, du_z = du_B3XYZ.unbind(1)
    # The launches apply -D^T, so the signs change.
    _launch(Product(1, p=g_BXYZ, out1=du_y, sign_1=-1), spacing, True)
    _launch(Product(0, q=g_BXYZ, s=g_BXYZ, out1=du_z, out2=du_x, sign_1=-1, sign_2=-1), spacing, True)
    return du_B3XYZ
