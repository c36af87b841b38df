r"""Velocities that are free of divergence and vanish in solid voxels, both exactly.

Every local derivative D makes two linear conditions on a velocity: ``div_D(u) = 0`` everywhere, and ``u = 0`` in
solid voxels. `project` gives the field nearest to a wanted one, w, that meets both:

    u = m (w - D^T phi),      D m D^T phi = D m w,

with m the mask of the components that may flow. It is the orthogonal projection, so it is its own adjoint: the
backward pass is `project` again. Through-flow needs no part of its own: constant flows, the flux through every throat
of a porous solid and every eddy are all in the space that is projected on. (A potential that vanishes at the walls has
none of the first two: by Stokes' theorem the flux through a throat is its circulation around the throat.)

phi is found by conjugate gradients, preconditioned with the Laplacian of the box without solids (by FFT). They run in
float32 for float64 fields too, where each round takes five digits off the float64 divergence: a third of the time for a
tenth more iterations. For ``staggered`` and ``central2`` every velocity is in two of the conditions, so D m D^T is the
Laplacian of a graph: at 128^3 about 30 iterations in float32, 80 in three rounds to the rounding of float64. For
``central4`` it is in four, and the conditions at a wall nearly depend on each other, the more the farther the next wall
is: hundreds of iterations do not suffice. But central4 = central2 T, T = (-1, 8, -1)/6 along the axis, so
u_x = T_y T_z v_x (and cyclic) makes of every velocity v that central2 conserves one that central4 conserves. It
vanishes in solids where v vanishes in their transverse neighbours too: walls grow by a voxel there, and the flow in
narrow pores with them.

``staggered`` is the marker-and-cell grid: each component on the lower faces of the voxels, walls on their faces, where
half-way bounce-back has them. `to_faces` and `to_centres` go between faces and the voxels' centres, where data are.

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

# Of h rms(div u) / rms(u), h = 1 cell, rms(u) over space of |u|.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
# What conjugate gradients in float32 take off a residual before rounding leads them astray; rounds of them; iterations
# a round. Beds and porous media need 2 or 3 rounds of 30, random voxels at the percolation threshold 4 of 900.
REDUCTION = 1e-5
ROUNDS = 8
MAX_ITERATIONS = 1000
RAMP = 3
_T = (-1 / 6, 8 / 6)  # beside the middle, in the middle


def to_faces(u_B3XYZ: Tensor) -> Tensor:
    """Each component on the lower face of its voxel: the mean of the two voxels that meet there."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(1, axis)) / 2)


def to_centres(u_B3XYZ: Tensor) -> Tensor:
    """Each component at the centre of its voxel: the mean of its two faces, zero in a voxel whose faces have none."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(-1, axis)) / 2)


def may_flow(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Mask [B, 3, X, Y, Z], bool, of what need not vanish: fluid voxels; for ``staggered`` faces between two of them.

    A voxel is fluid where ``solid`` is 0. For ``central4`` it is the mask of v above: fluid voxels with transverse
    neighbours that are all fluid.
    """
    fluid = (solid_B1XYZ == 0).expand(-1, 3, -1, -1, -1)
    if operator == "staggered":
        return _by_component(fluid, lambda m, axis: m & m.roll(1, axis))
    if operator == "central4":
        return ~_by_component(~fluid, _beside)
    return fluid


def project(w_B3XYZ: Tensor, solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """The velocity nearest to w with div_D(u) = 0 that is zero in solid voxels, [B, 3, X, Y, Z].

    For ``staggered`` w and u are on faces (`to_faces`). For ``central4`` it is v that is the nearest, to
    (T_y T_z)^-1 w_x and cyclic. What w has in solids does not count; a NaN or an infinity elsewhere makes its sample
    NaN.

    Args:
        w_B3XYZ: float32 or float64: the precision of the result and, by `TOLERANCE`, of its divergence.
        solid_B1XYZ: 0 in fluid voxels; any dtype.
        operator: ``central2``, ``central4`` or ``staggered``.

    Warns:
        RuntimeWarning: once, if the divergence stays above `TOLERANCE`; says how far.
    """
    mask = may_flow(solid_B1XYZ, operator)
    if operator != "central4":
        return _projected(w_B3XYZ, mask, operator)
    # T^-1 looks along lines: solids must not show.
    w_B3XYZ = torch.where(solid_B1XYZ == 0, w_B3XYZ, 0.0)
    return _t(_projected(_t_inverse(w_B3XYZ), mask, "central2"))


def ramp(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Factor of a vector potential whose curl is then zero in solid voxels, [B, 1 or 3, X, Y, Z] (DESIGN 3.1).

    0 where the curl of a solid voxel looks, 1 from `RAMP` voxels farther on, a cubic with no slope at its ends between.
    Distances are the largest of the three coordinates'. For ``staggered`` the potential is on edges, the velocity on
    faces: an edge is as far as the nearest of its four voxels.

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
    # Gradients may be so small that their squares are zero in float32. And a sample that is not finite becomes NaN
    # here, for which no comparison below asks to go on.
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
    """u -= m D^T phi; u is zero where the mask is, and its largest component about 1."""
    # Where nothing can flow, each round leaves 1e-5 of what it found: from here on it is nothing. (Where something can,
    # what rounding left of a large u is made free of divergence like everything else.)
    nothing_B = torch.finfo(u_B3XYZ.dtype).eps ** 2 * _rms(u_B3XYZ)
    flows_B3XYZ = mask_B3XYZ.float()
    for rounds_left in reversed(range(ROUNDS + 1)):
        residual_BXYZ = divergence(u_B3XYZ, operator)
        size_B, speed_B = _rms(residual_BXYZ), _rms(u_B3XYZ)
        limit_B = TOLERANCE[u_B3XYZ.dtype] * speed_B
        u_B3XYZ.masked_fill_(_spatial((size_B > limit_B) & (size_B <= nothing_B))[:, None], 0.0)
        open_B = (size_B > limit_B) & (size_B > nothing_B)
        if not open_B.any():
            return
        if not rounds_left:
            _warn(float((size_B / speed_B)[open_B].max()), operator, u_B3XYZ.dtype)
            return
        unit_B = torch.where(open_B, size_B, torch.inf)
        aim_B = (limit_B / (2 * size_B)).clamp(min=REDUCTION)
        phi_BXYZ = _solve((residual_BXYZ / _spatial(unit_B)).float(), flows_B3XYZ, operator, aim_B)
        phi_BXYZ = torch.where(_spatial(open_B), phi_BXYZ * _spatial(size_B), 0.0)
        u_B3XYZ -= divergence_adjoint(phi_BXYZ, operator).mul_(mask_B3XYZ)


def _solve(r_BXYZ: Tensor, mask_B3XYZ: Tensor, operator: str, aim_B: Tensor) -> Tensor:
    """phi with D m D^T phi = r up to a residual of rms ``aim_B``, float32. r is of rms 1, or 0 in samples to leave."""
    shape = (r_BXYZ.shape[1], r_BXYZ.shape[2], r_BXYZ.shape[3])
    inverse_xyz = inverse_laplacian(shape, operator, r_BXYZ.dtype, r_BXYZ.device)

    def precondition(x_BXYZ: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(x_BXYZ, dim=(1, 2, 3)).mul_(inverse_xyz), s=shape, dim=(1, 2, 3))

    phi_BXYZ = torch.zeros_like(r_BXYZ)
    direction_BXYZ = z_BXYZ = precondition(r_BXYZ)
    rz_B = _dot(r_BXYZ, z_BXYZ)
    open_B = rz_B > 0
    for _ in range(MAX_ITERATIONS):
        product_BXYZ = divergence(divergence_adjoint(direction_BXYZ, operator).mul_(mask_B3XYZ), operator)
        # A sample that is done stands still.
        step_B = _ratio(rz_B, _dot(direction_BXYZ, product_BXYZ)) * open_B
        phi_BXYZ.addcmul_(_spatial(step_B), direction_BXYZ)
        r_BXYZ.addcmul_(_spatial(step_B), product_BXYZ, value=-1)
        open_B = open_B & (_rms(r_BXYZ) > aim_B)
        if not open_B.any():
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
        message += f"{ROUNDS} rounds of conjugate gradients: a geometry harder than any tried; said once"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0: a sample that needs no further step takes none."""
    return torch.where(b > 0, a / b, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B]. A sum, not a matrix product, which may round its factors to TF32."""
    return (a * b).flatten(1).sum(1)


def _rms(x: Tensor) -> Tensor:
    """Root of the mean over space of the sum over components, [B]; of [B, X, Y, Z] or [B, 3, X, Y, Z]."""
    return (_dot(x, x) / x.shape[-3:].numel()).sqrt()


def _spatial(x_B: Tensor) -> Tensor:
    return x_B[:, None, None, None]


def _beside(solid_BXYZ: Tensor, own: int) -> Tensor:
    """True in solid voxels and in their neighbours, diagonal ones too, along the two axes that are not ``own``."""
    for axis in {1, 2, 3} - {own}:
        solid_BXYZ = solid_BXYZ | solid_BXYZ.roll(1, axis) | solid_BXYZ.roll(-1, axis)
    return solid_BXYZ


def _on_edges(solid_BXYZ: Tensor, own: int) -> Tensor:
    """1 on the edges of a component that touch a solid voxel."""
    for axis in {1, 2, 3} - {own}:
        solid_BXYZ = solid_BXYZ.maximum(solid_BXYZ.roll(1, axis))
    return solid_BXYZ


def _t(u_B3XYZ: Tensor) -> Tensor:
    """T along the two axes that are not the component's own."""
    side, middle = _T

    def along_others(u_BXYZ: Tensor, own: int) -> Tensor:
        for axis in {1, 2, 3} - {own}:
            u_BXYZ = side * (u_BXYZ.roll(1, axis) + u_BXYZ.roll(-1, axis)) + middle * u_BXYZ
        return u_BXYZ

    return _by_component(u_B3XYZ, along_others)


def _t_inverse(u_B3XYZ: Tensor) -> Tensor:
    """The inverse of `_t`."""
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


def _by_component(u_B3XYZ: Tensor, what: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each component, and its axis in [B, X, Y, Z], through ``what``."""
    return torch.stack([what(u, axis) for axis, u in zip((1, 2, 3), u_B3XYZ.unbind(1), strict=True)], 1)
