r"""Velocities that are exactly divergence-free and exactly zero in solid voxels.

With a local derivative D these are two linear conditions on a velocity: ``div_D(u) = 0`` everywhere, and ``u = 0`` in
solid voxels. `project` returns the field nearest to a given w that satisfies both:

    u = m (w - D^T phi),      D m D^T phi = D m w,

with m the mask of the components that may flow. The projection is orthogonal and so its own adjoint: the backward pass
is `project` again. Through-flow needs no extra term: constant flows, the flux through every throat of a porous solid
and every eddy are all in the projection's range. (A potential that vanishes at the walls represents neither constant
flows nor throats: by Stokes' theorem the flux through a throat is the potential's circulation around it.)

phi is found by conjugate gradients, preconditioned with the Laplacian of the box without solids (by FFT). They run in
float32 for float64 fields too, where each round reduces the float64 divergence by five digits: this takes a third of
the time for a tenth more iterations. For ``staggered`` and ``central2`` every velocity occurs in two conditions, so
D m D^T is the Laplacian of a graph: at 128^3 it takes about 30 iterations in float32, and 80 in three rounds to reach
the rounding of float64. For ``central4`` it occurs in four, and the conditions at a wall are nearly dependent, the more
so the farther away the next wall is: hundreds of iterations do not suffice. But central4 = central2 T, with
T = (-1, 8, -1)/6 along the axis, so u_x = T_y T_z v_x (and cyclic) turns every velocity v conserved by central2 into
one conserved by central4. It vanishes in solids if v also vanishes in their transverse neighbours: walls grow by a
voxel there, which narrows the flow in small pores.

``staggered`` is the marker-and-cell grid: each component on the lower faces of the voxels, and walls on faces, as with
half-way bounce-back. `to_faces` and `to_centres` convert between faces and voxel centres, where the data are.

Shapes: B batch, 3 components, X Y Z space, periodic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.kernels import divergence, divergence_adjoint
from shodh_moe.kernels.differentiation import STENCILS
from shodh_moe.tokenizer.laplacian import inverse_laplacian

# Tolerance of h rms(div u) / rms(u), with h = 1 cell and rms(u) of |u| over space.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
# Residual reduction per round of float32 conjugate gradients, limited by rounding; rounds; iterations per round. Beds
# and porous media need 2 or 3 rounds of 30, random voxels at the percolation threshold 4 of 900.
REDUCTION = 1e-5
ROUNDS = 8
MAX_ITERATIONS = 1000
RAMP = 3  # width of the rise of `ramp`, in voxels
_T = (-1 / 6, 8 / 6)  # coefficients of T: of both neighbours, and of the voxel itself


def to_faces(u_B3XYZ: Tensor) -> Tensor:
    """Interpolate each component to the lower face of its voxel: the mean of the two adjacent voxels."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(1, axis)) / 2)


def to_centres(u_B3XYZ: Tensor) -> Tensor:
    """Interpolate each component to the centre of its voxel: the mean of its two faces, zero in solids."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(-1, axis)) / 2)


def may_flow(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Return the mask of velocity components that may be nonzero, bool [B, 3, X, Y, Z].

    They are those of fluid voxels, where ``solid`` is 0. For ``staggered`` they are on faces between two fluid voxels;
    for ``central4`` the mask is that of v (see above): fluid voxels with only fluid transverse neighbours.
    """
    fluid = (solid_B1XYZ == 0).expand(-1, 3, -1, -1, -1)
    if operator == "staggered":
        return _by_component(fluid, lambda m, axis: m & m.roll(1, axis))
    if operator == "central4":
        return ~_by_component(~fluid, _beside)
    return fluid


def project(w_B3XYZ: Tensor, solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Return the velocity u nearest to w with div_D(u) = 0 that is zero in solid voxels, [B, 3, X, Y, Z].

    For ``staggered`` w and u are on faces (`to_faces`). For ``central4`` v is nearest to (T_y T_z)^-1 w_x and cyclic.
    Values of w in solids are ignored; a NaN or an infinity elsewhere makes its sample NaN.

    Args:
        w_B3XYZ: float32 or float64: the precision of the result and, by `TOLERANCE`, of its divergence.
        solid_B1XYZ: 0 in fluid voxels; any dtype.
        operator: ``central2``, ``central4`` or ``staggered``.

    Warns:
        RuntimeWarning: once, with the divergence, if it stays above `TOLERANCE`.
    """
    mask = may_flow(solid_B1XYZ, operator)
    if operator != "central4":
        return _projected(w_B3XYZ, mask, operator)
    # T^-1 acts along whole lines, so values in solids must be cleared first.
    w_B3XYZ = torch.where(solid_B1XYZ == 0, w_B3XYZ, 0.0)
    return _t(_projected(_t_inverse(w_B3XYZ), mask, "central2"))


def ramp(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Return a factor for a vector potential that makes its curl zero in solid voxels, [B, 1, X, Y, Z] (DESIGN 3.1).

    It is 0 within reach of a solid voxel's curl, 1 from `RAMP` voxels farther on, and a cubic with zero slope at both
    ends in between. Distances are Chebyshev distances: the largest of those along the three axes. For ``staggered`` the
    potential is on edges and the velocity on faces; an edge has the distance of the nearest of its four voxels, so each
    component has its own factor, [B, 3, X, Y, Z].

    Args:
        solid_B1XYZ: 1 in solid voxels, 0 elsewhere; float32 or float64, which is the result's dtype.
    """
    first, near = max(STENCILS[operator]), solid_B1XYZ
    if operator == "staggered":
        first, near = 0, _by_component(solid_B1XYZ.expand(-1, 3, -1, -1, -1), _on_edges)
    distance = torch.zeros_like(near)
    for _ in range(first + RAMP):
        distance = distance + (1 - near)
        near = F.max_pool3d(F.pad(near, (1,) * 6, mode="circular"), 3, stride=1)
    share = ((distance - first) / RAMP).clamp(0, 1)
    return share * share * (3 - 2 * share)


@torch.library.custom_op("shodh::project_masked", mutates_args=())
def _projected(w_B3XYZ: Tensor, mask_B3XYZ: Tensor, operator: str) -> Tensor:
    """m (w - D^T phi); its own adjoint."""
    w_B3XYZ = torch.where(mask_B3XYZ, w_B3XYZ, 0.0)
    # Gradients may be so small that their squares are zero in float32. A sample that is not finite becomes NaN here,
    # and every comparison below then ends its iterations.
    scale = w_B3XYZ.abs().amax((1, 2, 3, 4), keepdim=True)
    u_B3XYZ = (w_B3XYZ / torch.where(scale == 0, 1.0, scale)).contiguous()
    _remove_divergence(u_B3XYZ, mask_B3XYZ, operator)
    return u_B3XYZ.mul_(scale)


@_projected.register_fake
def _(w_B3XYZ: Tensor, mask_B3XYZ: Tensor, operator: str) -> Tensor:
    return w_B3XYZ.new_empty(w_B3XYZ.shape)


def _projected_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask_B3XYZ, ctx.operator = inputs
    ctx.save_for_backward(mask_B3XYZ)


def _projected_grad(ctx: Any, grad_B3XYZ: Tensor) -> tuple[Tensor, None, None]:
    return _projected(grad_B3XYZ, *ctx.saved_tensors, ctx.operator), None, None


_projected.register_autograd(_projected_grad, setup_context=_projected_context)


def _remove_divergence(u_B3XYZ: Tensor, mask_B3XYZ: Tensor, operator: str) -> None:
    """u -= m D^T phi, for u that is zero where the mask is and has a largest component of about 1."""
    # In a sample where nothing can flow, each round leaves 1e-5 of the velocity; below this floor it is set to zero.
    # (Where something can flow, the rounding errors of a large u are made divergence-free like the rest.)
    floor_B = torch.finfo(u_B3XYZ.dtype).eps ** 2 * _rms(u_B3XYZ)
    flows_B3XYZ = mask_B3XYZ.float()
    for rounds_left in reversed(range(ROUNDS + 1)):
        residual_BXYZ = divergence(u_B3XYZ, operator)
        size_B, speed_B = _rms(residual_BXYZ), _rms(u_B3XYZ)
        limit_B = TOLERANCE[u_B3XYZ.dtype] * speed_B
        u_B3XYZ.masked_fill_(_spatial((size_B > limit_B) & (size_B <= floor_B))[:, None], 0.0)
        active_B = (size_B > limit_B) & (size_B > floor_B)
        if not active_B.any():
            return
        if not rounds_left:
            _warn(float((size_B / speed_B)[active_B].max()), operator, u_B3XYZ.dtype)
            return
        unit_B = torch.where(active_B, size_B, torch.inf)
        target_B = (limit_B / (2 * size_B)).clamp(min=REDUCTION)
        phi_BXYZ = _solve((residual_BXYZ / _spatial(unit_B)).float(), flows_B3XYZ, operator, target_B)
        phi_BXYZ = torch.where(_spatial(active_B), phi_BXYZ * _spatial(size_B), 0.0)
        u_B3XYZ -= divergence_adjoint(phi_BXYZ, operator).mul_(mask_B3XYZ)


def _solve(r_BXYZ: Tensor, mask_B3XYZ: Tensor, operator: str, target_B: Tensor) -> Tensor:
    """Solve D m D^T phi = r by conjugate gradients down to a residual with rms ``target_B``, float32 [B, X, Y, Z].

    r has rms 1, or 0 for samples to skip, and is overwritten.
    """
    shape = (r_BXYZ.shape[1], r_BXYZ.shape[2], r_BXYZ.shape[3])
    inverse_xyz = inverse_laplacian(shape, operator, r_BXYZ.dtype, r_BXYZ.device)

    def precondition(x_BXYZ: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(x_BXYZ, dim=(1, 2, 3)).mul_(inverse_xyz), s=shape, dim=(1, 2, 3))

    phi_BXYZ = torch.zeros_like(r_BXYZ)
    direction_BXYZ = z_BXYZ = precondition(r_BXYZ)
    rz_B = _dot(r_BXYZ, z_BXYZ)
    active_B = rz_B > 0
    for _ in range(MAX_ITERATIONS):
        product_BXYZ = divergence(divergence_adjoint(direction_BXYZ, operator).mul_(mask_B3XYZ), operator)
        # A converged sample no longer changes.
        step_B = _ratio(rz_B, _dot(direction_BXYZ, product_BXYZ)) * active_B
        phi_BXYZ.addcmul_(_spatial(step_B), direction_BXYZ)
        r_BXYZ.addcmul_(_spatial(step_B), product_BXYZ, value=-1)
        active_B = active_B & (_rms(r_BXYZ) > target_B)
        if not active_B.any():
            break
        z_BXYZ = precondition(r_BXYZ)
        rz_B, before_B = _dot(r_BXYZ, z_BXYZ), rz_B
        direction_BXYZ = z_BXYZ.addcmul_(_spatial(_ratio(rz_B, before_B)), direction_BXYZ)
    return phi_BXYZ


_warned = False


def _warn(reached: float, operator: str, dtype: torch.dtype) -> None:
    global _warned
    if not _warned:
        _warned = True
        message = f"h rms(div u) / rms(u) is {reached:.1e} for {operator}, not below {TOLERANCE[dtype]:.0e}, after "
        message += f"{ROUNDS} rounds of conjugate gradients: the geometry is harder than any tested (shown only once)"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 where b is 0, so that a converged sample takes no step."""
    return torch.where(b > 0, a / b, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product per sample, [B]; computed as a sum, because a matrix product may round its factors to TF32."""
    return (a * b).flatten(1).sum(1)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over space of the magnitude, [B]; of [B, X, Y, Z] or [B, 3, X, Y, Z]."""
    return (_dot(x, x) / x.shape[-3:].numel()).sqrt()


def _spatial(x_B: Tensor) -> Tensor:
    return x_B[:, None, None, None]


def _beside(solid_BXYZ: Tensor, own: int) -> Tensor:
    """True in solid voxels and their neighbours, diagonals included, along the two axes other than ``own``."""
    for axis in {1, 2, 3} - {own}:
        solid_BXYZ = solid_BXYZ | solid_BXYZ.roll(1, axis) | solid_BXYZ.roll(-1, axis)
    return solid_BXYZ


def _on_edges(solid_BXYZ: Tensor, own: int) -> Tensor:
    """1 on the edges of a component that touch a solid voxel."""
    for axis in {1, 2, 3} - {own}:
        solid_BXYZ = solid_BXYZ.maximum(solid_BXYZ.roll(1, axis))
    return solid_BXYZ


def _t(u_B3XYZ: Tensor) -> Tensor:
    """Apply T along the two axes other than the component's own."""
    side, middle = _T

    def along_others(u_BXYZ: Tensor, own: int) -> Tensor:
        for axis in {1, 2, 3} - {own}:
            u_BXYZ = side * (u_BXYZ.roll(1, axis) + u_BXYZ.roll(-1, axis)) + middle * u_BXYZ
        return u_BXYZ

    return _by_component(u_B3XYZ, along_others)


def t_matrix(size: int) -> Tensor:
    """T along an axis as a matrix, float64 [size, size]."""
    identity = torch.eye(size, dtype=torch.float64)
    return _T[0] * (identity.roll(1, 0) + identity.roll(-1, 0)) + _T[1] * identity


def _t_inverse(u_B3XYZ: Tensor) -> Tensor:
    """Apply the inverse of `_t`, by FFT."""
    shape = u_B3XYZ.shape[2:]
    symbols = []
    for axis, size in enumerate(shape, 1):
        angle = torch.arange(size if axis < 3 else size // 2 + 1, dtype=torch.float64) * (2 * torch.pi / size)
        symbol = 2 * _T[0] * torch.cos(angle) + _T[1]
        symbols.append(symbol.to(u_B3XYZ).view([-1 if other == axis else 1 for other in (1, 2, 3)]))

    def along_others(u_BXYZ: Tensor, own: int) -> Tensor:
        first, second = (symbols[axis - 1] for axis in {1, 2, 3} - {own})
        return torch.fft.irfftn(torch.fft.rfftn(u_BXYZ, dim=(1, 2, 3)) / (first * second), s=shape, dim=(1, 2, 3))

    return _by_component(u_B3XYZ, along_others)


def _by_component(u_B3XYZ: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply ``function`` to each component [B, X, Y, Z] with the index of its own axis in that shape (1, 2 or 3)."""
    return torch.stack([function(u, axis) for axis, u in zip((1, 2, 3), u_B3XYZ.unbind(1), strict=True)], 1)
