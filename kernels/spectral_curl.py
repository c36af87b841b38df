"""Curl and divergence on a periodic grid with circulant derivative operators (DESIGN 3.1).

The spectral derivative along one axis is a product with a dense, antisymmetric N x N matrix: for N <= 256 the batched
matrix product is faster than Fourier transforms (benchmarks/spectral_curl.py). The local operators are stencils.
Operators along different axes commute, so the divergence of a curl vanishes up to rounding with any of them.
`kernels.differentiation` defines the operators, and the positions of the values for ``staggered``.

Results have the dtype of float32 and float64 fields, and are float32 for bfloat16 and float16 fields, because a
velocity rounded to bfloat16 would conserve mass only to 4e-3. Gradients have the dtype of the input.

Shapes: B batch, 3 vector components, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels.backend import exact, use_reference, use_triton
from shodh_moe.kernels.differentiation import (
    MATRIX_LIMIT,
    OPERATORS,
    cached_matrix,
    check_size,
    differentiation_matrix,
    spacings,
    stencil,
)

__all__ = ["OPERATORS", "curl", "differentiation_matrix", "divergence", "divergence_adjoint"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def curl(
    potential_B3XYZ: Tensor,
    mean_B3: Tensor | None = None,
    operator: str = "spectral",
    spacing: float | Sequence[float] = 1.0,
    adjoint: bool = False,
) -> Tensor:
    """u = curl_D(A) + Ubar, [B, 3, X, Y, Z]: u_x = D_y A_z - D_z A_y and cyclic, plus a constant.

    Args:
        potential_B3XYZ: A, float32, float64, bfloat16 or float16, any strides.
        mean_B3: Ubar, the constant part, which a periodic curl cannot represent; None means zero.
        operator: one of `OPERATORS`.
        spacing: distance between grid points; one for each of x, y and z if it differs between the axes.
        adjoint: apply the transposed map instead, which is the curl with -D^T for D: the same for antisymmetric
            operators, the curl with backward differences for ``staggered``.

    Returns:
        float64 for a float64 potential, else float32.

    Raises:
        ValueError: a wrong rank, number of components, dtype, device, operator or spacing; fewer points along an
            axis than the operator needs (spectral 1, staggered 2, central2 3, central4 5) or, for ``spectral``,
            more than 256.
    """
    steps = spacings(spacing, operator)
    _check_field("potential_B3XYZ", potential_B3XYZ, operator)
    if mean_B3 is not None:
        _check_mean(mean_B3, potential_B3XYZ)
    return _curl(potential_B3XYZ, mean_B3, operator, steps, adjoint)


def divergence(u_B3XYZ: Tensor, operator: str = "spectral", spacing: float | Sequence[float] = 1.0) -> Tensor:
    """div_D(u) = D_x u_x + D_y u_y + D_z u_z, [B, X, Y, Z], with the same operators as `curl`.

    Dtypes and errors as for `curl`. Measure mass conservation in float64: in float32, rounding alone gives 1e-7 times
    velocity over spacing.
    """
    steps = spacings(spacing, operator)
    _check_field("u_B3XYZ", u_B3XYZ, operator)
    return _divergence(u_B3XYZ, operator, steps)


def divergence_adjoint(g_BXYZ: Tensor, operator: str = "spectral", spacing: float | Sequence[float] = 1.0) -> Tensor:
    """The transposed `divergence` D^T g, [B, 3, X, Y, Z], with components D_i^T g (-D_i g for antisymmetric D).

    Dtypes and errors as for `curl`.
    """
    steps = spacings(spacing, operator)
    if g_BXYZ.ndim != 4:
        raise ValueError(f"g_BXYZ has shape {list(g_BXYZ.shape)}; expected [B, X, Y, Z]")
    _check_field("g_BXYZ", g_BXYZ[:, None].expand(-1, 3, -1, -1, -1), operator)
    return _divergence_backward(g_BXYZ.to(compute_dtype(g_BXYZ.dtype)), operator, steps)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and result for a field of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_field(name: str, field: Tensor, operator: str) -> None:
    if field.ndim != 5 or field.shape[1] != 3:
        raise ValueError(f"{name} has shape {list(field.shape)}; expected [B, 3, X, Y, Z]")
    if field.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {field.dtype}; expected one of {', '.join(str(d) for d in DTYPES)}")
    for axis, size in zip("XYZ", field.shape[2:], strict=True):
        check_size(f"{axis} of {name}", size, operator)
        if operator == "spectral" and size > MATRIX_LIMIT:
            raise ValueError(f"{axis} of {name} is {size}: the operator 'spectral' takes at most {MATRIX_LIMIT} points")


def _check_mean(mean_B3: Tensor, potential_B3XYZ: Tensor) -> None:
    batch = potential_B3XYZ.shape[0]
    if mean_B3.ndim != 2 or mean_B3.shape[0] != batch or mean_B3.shape[1] != 3:
        raise ValueError(f"mean_B3 has shape {list(mean_B3.shape)}; expected [{batch}, 3]")
    if mean_B3.dtype not in DTYPES:
        raise ValueError(f"mean_B3 has dtype {mean_B3.dtype}; expected one of {', '.join(str(d) for d in DTYPES)}")
    if mean_B3.device != potential_B3XYZ.device:
        raise ValueError(f"mean_B3 is on {mean_B3.device}; potential_B3XYZ is on {potential_B3XYZ.device}")


How = tuple[str, list[float], bool]  # operator, spacing along x, y and z, adjoint


# The torch reference. Everything is accumulated in the output, so nothing is stacked, added or copied afterwards.


def _add_derivative(out_XYZ: Tensor, f_XYZ: Tensor, axis: int, sign: int, how: How) -> None:
    """out += sign * D f along ``axis`` (0, 1 or 2). Both contiguous."""
    operator, steps, adjoint = how
    spacing = steps[axis]
    size = f_XYZ.shape[axis]
    if operator != "spectral":
        for offset, weight in stencil(operator, spacing, adjoint).items():
            _add_shifted(out_XYZ, f_XYZ, axis, offset % size, sign * weight)
        return
    d = cached_matrix(size, operator, spacing, f_XYZ.dtype, f_XYZ.device, adjoint)
    if axis == 0:
        out = out_XYZ.view(size, -1)
        torch.addmm(out, d, f_XYZ.view(size, -1), alpha=sign, out=out)
    elif axis == 1:
        torch.baddbmm(out_XYZ, d.expand(f_XYZ.shape[0], size, size), f_XYZ, alpha=sign, out=out_XYZ)
    else:
        out = out_XYZ.view(-1, size)
        torch.addmm(out, f_XYZ.view(-1, size), d.T, alpha=sign, out=out)


def _add_shifted(out_XYZ: Tensor, f_XYZ: Tensor, axis: int, offset: int, weight: float) -> None:
    """out[j] += weight * f[j + offset], periodic, 0 <= offset < size."""
    inner = f_XYZ.shape[axis] - offset
    out_XYZ.narrow(axis, 0, inner).add_(f_XYZ.narrow(axis, offset, inner), alpha=weight)
    if offset:
        out_XYZ.narrow(axis, inner, offset).add_(f_XYZ.narrow(axis, 0, offset), alpha=weight)


def _curl_reference(potential_B3XYZ: Tensor, mean_B3: Tensor | None, how: How) -> Tensor:
    a_B3XYZ = potential_B3XYZ.to(compute_dtype(potential_B3XYZ.dtype)).contiguous()
    u_B3XYZ = torch.empty_like(a_B3XYZ)
    u_B3XYZ.copy_(mean_B3[:, :, None, None, None]) if mean_B3 is not None else u_B3XYZ.zero_()
    for a_3XYZ, u_3XYZ in zip(a_B3XYZ, u_B3XYZ, strict=True):
        for i in range(3):  # u_i = D_j a_k - D_k a_j
            j, k = (i + 1) % 3, (i + 2) % 3
            _add_derivative(u_3XYZ[i], a_3XYZ[k], j, 1, how)
            _add_derivative(u_3XYZ[i], a_3XYZ[j], k, -1, how)
    return u_B3XYZ


def _divergence_reference(u_B3XYZ: Tensor, how: How) -> Tensor:
    u_B3XYZ = u_B3XYZ.to(compute_dtype(u_B3XYZ.dtype)).contiguous()
    div_BXYZ = torch.zeros_like(u_B3XYZ[:, 0], memory_format=torch.contiguous_format)
    for u_3XYZ, div_XYZ in zip(u_B3XYZ, div_BXYZ, strict=True):
        for axis in range(3):
            _add_derivative(div_XYZ, u_3XYZ[axis], axis, 1, how)
    return div_BXYZ


def _divergence_backward_reference(g_BXYZ: Tensor, how: How) -> Tensor:
    g_BXYZ = g_BXYZ.contiguous()
    du_B3XYZ = g_BXYZ.new_zeros((g_BXYZ.shape[0], 3, *g_BXYZ.shape[1:]))
    for g_XYZ, du_3XYZ in zip(g_BXYZ, du_B3XYZ, strict=True):
        for axis in range(3):  # D^T = -(-D^T)
            _add_derivative(du_3XYZ[axis], g_XYZ, axis, -1, how)
    return du_B3XYZ


@torch.library.custom_op("shodh::curl", mutates_args=())
def _curl(
    potential_B3XYZ: Tensor, mean_B3: Tensor | None, operator: str, spacing: list[float], adjoint: bool
) -> Tensor:  # also the backward pass: the transposed curl of the gradient
    if use_triton(potential_B3XYZ):
        from shodh_moe.kernels import spectral_curl_triton

        return spectral_curl_triton.curl(potential_B3XYZ, mean_B3, operator, spacing, adjoint)
    if operator == "spectral" and potential_B3XYZ.device.type == "cpu" and not use_reference():
        from shodh_moe.kernels import spectral_curl_cpu  # imported here: a GPU does not need numba

        if spectral_curl_cpu.fits(potential_B3XYZ):
            return spectral_curl_cpu.curl(potential_B3XYZ.contiguous(), mean_B3, spacing, adjoint)
    with exact(potential_B3XYZ):
        return _curl_reference(potential_B3XYZ, mean_B3, (operator, spacing, adjoint))


@_curl.register_fake
def _(potential_B3XYZ: Tensor, mean_B3: Tensor | None, operator: str, spacing: list[float], adjoint: bool) -> Tensor:
    return potential_B3XYZ.new_empty(potential_B3XYZ.shape, dtype=compute_dtype(potential_B3XYZ.dtype))


def _curl_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    potential_B3XYZ, mean_B3, ctx.operator, ctx.spacing, ctx.adjoint = inputs
    ctx.dtype = potential_B3XYZ.dtype
    ctx.mean_dtype = None if mean_B3 is None else mean_B3.dtype


def _curl_grad(ctx: Any, grad_B3XYZ: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    potential = mean = None
    if ctx.needs_input_grad[0]:
        potential = _curl(grad_B3XYZ, None, ctx.operator, ctx.spacing, not ctx.adjoint).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        mean = grad_B3XYZ.sum(dim=(2, 3, 4)).to(ctx.mean_dtype)
    return potential, mean, None, None, None


_curl.register_autograd(_curl_grad, setup_context=_curl_context)


@torch.library.custom_op("shodh::divergence", mutates_args=())
def _divergence(u_B3XYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    if use_triton(u_B3XYZ):
        from shodh_moe.kernels import spectral_curl_triton

        return spectral_curl_triton.divergence(u_B3XYZ, operator, spacing)
    with exact(u_B3XYZ):
        return _divergence_reference(u_B3XYZ, (operator, spacing, False))


@_divergence.register_fake
def _(u_B3XYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    batch, _, x, y, z = u_B3XYZ.shape
    return u_B3XYZ.new_empty((batch, x, y, z), dtype=compute_dtype(u_B3XYZ.dtype))


@torch.library.custom_op("shodh::divergence_backward", mutates_args=())
def _divergence_backward(g_BXYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    """du_i = D_i^T g, [B, 3, X, Y, Z]."""
    if use_triton(g_BXYZ):
        from shodh_moe.kernels import spectral_curl_triton

        return spectral_curl_triton.divergence_backward(g_BXYZ, operator, spacing)
    with exact(g_BXYZ):
        return _divergence_backward_reference(g_BXYZ, (operator, spacing, True))


@_divergence_backward.register_fake
def _(g_BXYZ: Tensor, operator: str, spacing: list[float]) -> Tensor:
    batch, x, y, z = g_BXYZ.shape
    return g_BXYZ.new_empty((batch, 3, x, y, z))


def _divergence_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    field, ctx.operator, ctx.spacing = inputs
    ctx.dtype = field.dtype


def _divergence_grad(ctx: Any, grad_BXYZ: Tensor) -> tuple[Tensor, None, None]:
    return _divergence_backward(grad_BXYZ, ctx.operator, ctx.spacing).to(ctx.dtype), None, None


def _divergence_backward_grad(ctx: Any, grad_B3XYZ: Tensor) -> tuple[Tensor, None, None]:
    return _divergence(grad_B3XYZ, ctx.operator, ctx.spacing), None, None


_divergence.register_autograd(_divergence_grad, setup_context=_divergence_context)
_divergence_backward.register_autograd(_divergence_backward_grad, setup_context=_divergence_context)
