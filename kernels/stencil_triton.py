"""Triton kernels of the local derivative operators: curl, divergence and its transpose, in one launch each.

A program computes a tile of lines along z for all output components; it reads neighbours from the caches.
The operator's weights are data, `weights_ptr[axis * (2 * REACH + 1) + offset + REACH]`. So forward, adjoint and
transposed forms use the same kernels, and the spacing may differ between the axes.

Shapes: B batch, 3 vector components, X Y Z space, Z contiguous.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels.backend import launch, settings
from shodh_moe.kernels.differentiation import STENCILS, stencil

REACH = 2  # points that the widest stencil extends to either side


@triton.jit
def _derivative(
    f_ptr,
    weights_ptr,
    index,
    mask,
    position,
    size,
    stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Sum over offsets of weight * f[position + offset], periodic along the axis with this size and stride.

    ``weights_ptr`` points to the weights of the axis.
    """
    total = tl.zeros(index.shape, weights_ptr.dtype.element_ty)
    for offset in tl.static_range(LOW, HIGH + 1):
        if offset != 0 or CENTRE:
            moved = position + offset
            moved = tl.where(moved < 0, moved + size, tl.where(moved >= size, moved - size, moved))
            step = (moved - position).to(tl.int64) * stride
            f = tl.load(f_ptr + index + step, mask=mask, other=0.0)
            total += tl.load(weights_ptr + offset + 2) * f.to(total.dtype)
    return total


@triton.jit
def _tile(x_size, y_size, z_size, BLOCK_R: tl.constexpr, BLOCK_Z: tl.constexpr):
    """x, y, z, index in the component and mask of this program's tile; cells of a component; offset of the batch."""
    tiles_z = tl.cdiv(z_size, BLOCK_Z)
    row = (tl.program_id(0) // tiles_z) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    z = (tl.program_id(0) % tiles_z) * BLOCK_Z + tl.arange(0, BLOCK_Z)[None, :]
    index = row.to(tl.int64) * z_size + z
    volume = tl.cast(x_size, tl.int64) * y_size * z_size
    mask = (row < x_size * y_size) & (z < z_size)
    return row // y_size, row % y_size, z, index, mask, volume, tl.program_id(1) * volume


@triton.jit
def curl_kernel(
    a_ptr,  # [B, 3, X, Y, Z]
    mean_ptr,  # [B, 3]
    weights_ptr,  # [3, 2 * REACH + 1]
    out_ptr,  # [B, 3, X, Y, Z]
    x_size,
    y_size,
    z_size,
    HAS_MEAN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
) -> None:
    """out = curl_D(a) + mean."""
    x, y, z, index, mask, volume, batch = _tile(x_size, y_size, z_size, BLOCK_R, BLOCK_Z)
    a_x = a_ptr + 3 * batch
    a_y = a_x + volume
    a_z = a_y + volume
    u_x = _derivative(a_z, weights_ptr + 5, index, mask, y, y_size, z_size, LOW, HIGH, CENTRE)
    u_x -= _derivative(a_y, weights_ptr + 10, index, mask, z, z_size, 1, LOW, HIGH, CENTRE)
    u_y = _derivative(a_x, weights_ptr + 10, index, mask, z, z_size, 1, LOW, HIGH, CENTRE)
    u_y -= _derivative(a_z, weights_ptr, index, mask, x, x_size, y_size * z_size, LOW, HIGH, CENTRE)
    u_z = _derivative(a_y, weights_ptr, index, mask, x, x_size, y_size * z_size, LOW, HIGH, CENTRE)
    u_z -= _derivative(a_x, weights_ptr + 5, index, mask, y, y_size, z_size, LOW, HIGH, CENTRE)
    if HAS_MEAN:
        mean = mean_ptr + 3 * tl.program_id(1)
        u_x += tl.load(mean)
        u_y += tl.load(mean + 1)
        u_z += tl.load(mean + 2)
    out = out_ptr + 3 * batch + index
    tl.store(out, u_x, mask=mask)
    tl.store(out + volume, u_y, mask=mask)
    tl.store(out + 2 * volume, u_z, mask=mask)


@triton.jit
def divergence_kernel(
    u_ptr,  # [B, 3, X, Y, Z]
    weights_ptr,
    out_ptr,  # [B, X, Y, Z]
    x_size,
    y_size,
    z_size,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
) -> None:
    """out = D_x u_x + D_y u_y + D_z u_z."""
    x, y, z, index, mask, volume, batch = _tile(x_size, y_size, z_size, BLOCK_R, BLOCK_Z)
    u_x = u_ptr + 3 * batch
    total = _derivative(u_x, weights_ptr, index, mask, x, x_size, y_size * z_size, LOW, HIGH, CENTRE)
    total += _derivative(u_x + volume, weights_ptr + 5, index, mask, y, y_size, z_size, LOW, HIGH, CENTRE)
    total += _derivative(u_x + 2 * volume, weights_ptr + 10, index, mask, z, z_size, 1, LOW, HIGH, CENTRE)
    tl.store(out_ptr + batch + index, total, mask=mask)


@triton.jit
def gradient_kernel(
    g_ptr,  # [B, X, Y, Z]
    weights_ptr,
    out_ptr,  # [B, 3, X, Y, Z]
    x_size,
    y_size,
    z_size,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
) -> None:
    """out_i = D_i g, one component per axis."""
    x, y, z, index, mask, volume, batch = _tile(x_size, y_size, z_size, BLOCK_R, BLOCK_Z)
    g = g_ptr + batch
    out = out_ptr + 3 * batch + index
    d = _derivative(g, weights_ptr, index, mask, x, x_size, y_size * z_size, LOW, HIGH, CENTRE)
    tl.store(out, d, mask=mask)
    d = _derivative(g, weights_ptr + 5, index, mask, y, y_size, z_size, LOW, HIGH, CENTRE)
    tl.store(out + volume, d, mask=mask)
    d = _derivative(g, weights_ptr + 10, index, mask, z, z_size, 1, LOW, HIGH, CENTRE)
    tl.store(out + 2 * volume, d, mask=mask)


@lru_cache(maxsize=64)
def _weights(
    operator: str, spacing: tuple[float, ...], adjoint: bool, sign: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    axes = [stencil(operator, one, adjoint) for one in spacing]
    values = [[sign * weights.get(offset, 0.0) for offset in range(-REACH, REACH + 1)] for weights in axes]
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _launch(
    kernel: object,
    inputs: list[Tensor],
    out: Tensor,
    operator: str,
    spacing: list[float],
    adjoint: bool,
    sign: int,
    **meta: int,
) -> None:
    """Run ``kernel`` over the grid of ``out`` with sign * D, or sign * -D^T if ``adjoint``."""
    weights = _weights(operator, tuple(spacing), adjoint, sign, out.dtype, out.device)
    offsets = [-o if adjoint else o for o in STENCILS[operator]]
    batch, x, y, z = out.shape[0], *out.shape[-3:]
    default = {"BLOCK": 512, "BLOCK_Z": 128, "num_warps": 4}
    block = settings("stencil", str(out.dtype).removeprefix("torch."), default, out.device)
    # Short lines share a tile. Powers of two limit the number of compiled variants.
    block_z = min(block["BLOCK_Z"], triton.next_power_of_2(z))
    block_r = max(block["BLOCK"] // block_z, 1)
    meta |= {"LOW": min(offsets), "HIGH": max(offsets), "CENTRE": 0 in offsets}
    launch(
        kernel,
        (triton.cdiv(x * y, block_r) * triton.cdiv(z, block_z), batch),
        *inputs,
        weights,
        out,
        x,
        y,
        z,
        BLOCK_R=block_r,
        BLOCK_Z=block_z,
        num_warps=block["num_warps"],
        **meta,
    )


def curl(
    potential_B3XYZ: Tensor,
    mean_B3: Tensor | None,
    out_B3XYZ: Tensor,
    operator: str,
    spacing: list[float],
    adjoint: bool,
) -> None:
    """out = curl_D(A) + mean. Tensors are contiguous, and the mean has the dtype of ``out_B3XYZ``."""
    mean = out_B3XYZ if mean_B3 is None else mean_B3  # any tensor can replace a mean that is not read
    _launch(
        curl_kernel, [potential_B3XYZ, mean], out_B3XYZ, operator, spacing, adjoint, 1, HAS_MEAN=mean_B3 is not None
    )


def divergence(u_B3XYZ: Tensor, out_BXYZ: Tensor, operator: str, spacing: list[float]) -> None:
    """out = div_D(u)."""
    _launch(divergence_kernel, [u_B3XYZ], out_BXYZ, operator, spacing, False, 1)


def divergence_backward(g_BXYZ: Tensor, out_B3XYZ: Tensor, operator: str, spacing: list[float]) -> None:
    """out_i = D_i^T g."""
    _launch(gradient_kernel, [g_BXYZ], out_B3XYZ, operator, spacing, True, -1)
