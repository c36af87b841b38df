r"""Velocities that are free of divergence and vanish in solid voxels, both exactly.

Every local derivative D makes two linear conditions on a velocity: ``div_D(u) = 0`` everywhere, and ``u = 0`` in
solid voxels. `project` gives the field nearest to a wanted one, w, that meets both:

    u = m (w - D^T phi),      D m D^T phi = D m w,

with m the mask of the components that may flow. It is the orthogonal projection, so it is its own adjoint: the
backward pass is `project` again. Through-flow needs no part of its own: constant flows, the flux through every throat
of a porous solid and every eddy are all in the space that is projected on. (A potential that vanishes at the walls has
none of the first two: by Stokes' theorem the flux through a throat is its circulation around the throat.)

phi is found by conjugate gradients, preconditioned with the Laplacian of the box without solids (by FFT). For
``staggered`` and ``central2`` every velocity is in two of the conditions, so D m D^T is the Laplacian of a graph: 10
iterations in float32, 30 to 50 to the rounding of float64. For ``central4`` it is in four, and the conditions at a
wall nearly depend on each other, the more the farther the next wall is: hundreds of iterations do not suffice. But
central4 = central2 T, T = (-1, 8, -1)/6 along the axis, so transverse smoothing u_x = T_y T_z v_x (and cyclic) makes
of every velocity v that central2 conserves one that central4 conserves. It vanishes in solids where v vanishes in
their transverse neighbours too: walls grow by a voxel there, and the flow in narrow pores with them.

``staggered`` is the marker-and-cell grid: each component on the lower faces of the voxels, walls on their faces, where
half-way bounce-back has them. `to_faces` and `to_centres` go between faces and the voxels' centres, where data are.

Shapes: B batch, 3 components, X Y Z space, periodic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.kernels import divergence, divergence_adjoint
from shodh_moe.kernels.differentiation import STENCILS
from shodh_moe.tokenizer.laplacian import inverse_laplacian

# Of h rms(div u) / rms(u), h = 1 cell.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
MAX_ITERATIONS = 1000
RAMP = 3
# Of T, and of what nearly undoes it.
_SHARPEN, _SMOOTH = (-1 / 6, 8 / 6), (1 / 6, 4 / 6)


def to_faces(u_B3XYZ: Tensor) -> Tensor:
    """Each component on the lower face of its voxel: the mean of the two voxels that meet there."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(1, axis)) / 2)


def to_centres(u_B3XYZ: Tensor) -> Tensor:
    """Each component at the centre of its voxel: the mean of its two faces, zero in a voxel whose faces have none."""
    return _by_component(u_B3XYZ, lambda u, axis: (u + u.roll(-1, axis)) / 2)


def may_flow(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Mask [B, 3, X, Y, Z] of what need not vanish: 1 in fluid; for ``staggered`` on faces between two fluid voxels.

    For ``central4`` the mask of v above: 1 in fluid voxels with transverse neighbours that are all fluid.
    """
    fluid = (1 - solid_B1XYZ).expand(-1, 3, -1, -1, -1)
    if operator == "staggered":
        return _by_component(fluid, lambda m, axis: m * m.roll(1, axis))
    if operator == "central4":
        return (_transverse(fluid, 1.0, 1.0) == 9).to(fluid.dtype)
    return fluid


def project(w_B3XYZ: Tensor, solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """The velocity nearest to w with div_D(u) = 0 that is zero in solid voxels, [B, 3, X, Y, Z].

    For ``staggered`` w and u are on faces (`to_faces`). For ``central4`` it is v that is the nearest.

    Args:
        w_B3XYZ: float32 or float64: the precision of the result and, by `TOLERANCE`, of its divergence.
        solid_B1XYZ: 1 in solid voxels, 0 elsewhere.
        operator: ``central2``, ``central4`` or ``staggered``.
    """
    mask = may_flow(solid_B1XYZ.to(w_B3XYZ.dtype), operator)
    if operator != "central4":
        return _projected(w_B3XYZ, mask, operator)
    return _transverse(_projected(_transverse(w_B3XYZ, *_SMOOTH), mask, "central2"), *_SHARPEN)


def ramp(solid_B1XYZ: Tensor, operator: str) -> Tensor:
    """Factor of a vector potential whose curl is then zero in solid voxels, [B, 3, X, Y, Z] (DESIGN 3.1).

    0 where the curl of a solid voxel looks, 1 from `RAMP` voxels farther on, a cubic with no slope at its ends between.
    Distances are the largest of the three coordinates'. For ``staggered`` the potential is on edges, the velocity on
    faces: an edge is as far as the nearest of its four voxels.
    """
    first = 0 if operator == "staggered" else max(STENCILS[operator])
    near_B3XYZ = solid_B1XYZ.expand(-1, 3, -1, -1, -1)
    if operator == "staggered":
        near_B3XYZ = _by_component(near_B3XYZ, _on_edges)
    distance_B3XYZ = torch.zeros_like(near_B3XYZ)
    for _ in range(first + RAMP):
        distance_B3XYZ = distance_B3XYZ + (1 - near_B3XYZ)
        near_B3XYZ = F.max_pool3d(F.pad(near_B3XYZ, (1,) * 6, mode="circular"), 3, stride=1)
    share = ((distance_B3XYZ - first) / RAMP).clamp(0, 1)
    return share * share * (3 - 2 * share)


@torch.library.custom_op("shodh::project_masked", mutates_args=())
def _projected(w_B3XYZ: Tensor, mask_B3XYZ: Tensor, operator: str) -> Tensor:
    """m (w - D^T phi); its own adjoint."""
    u_B3XYZ = mask_B3XYZ * w_B3XYZ
    # What rounding leaves of w where next to nothing of it may flow.
    noise_B = 4 * torch.finfo(u_B3XYZ.dtype).eps * _rms(u_B3XYZ)
    left = MAX_ITERATIONS
    while left > 0:  # the residual that the iterations carry along drifts from the true one
        residual_BXYZ = divergence(u_B3XYZ, operator)
        limit_B = (TOLERANCE[u_B3XYZ.dtype] * _rms(u_B3XYZ)).maximum(noise_B)
        if not (_rms(residual_BXYZ[:, None]) > limit_B).any():
            break
        phi_BXYZ, iterations = _solve(residual_BXYZ, mask_B3XYZ, operator, limit_B, left)
        u_B3XYZ = u_B3XYZ - mask_B3XYZ * divergence_adjoint(phi_BXYZ, operator)
        left -= iterations
    return u_B3XYZ


@_projected.register_fake
def _(w_B3XYZ: Tensor, mask_B3XYZ: Tensor, operator: str) -> Tensor:
    return torch.empty_like(w_B3XYZ)


def _projected_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask_B3XYZ, ctx.operator = inputs
    ctx.save_for_backward(mask_B3XYZ)


def _projected_grad(ctx: Any, grad_B3XYZ: Tensor) -> tuple[Tensor, None, None]:
    return _projected(grad_B3XYZ, *ctx.saved_tensors, ctx.operator), None, None


_projected.register_autograd(_projected_grad, setup_context=_projected_context)


def _solve(r_BXYZ: Tensor, mask_B3XYZ: Tensor, operator: str, limit_B: Tensor, most: int) -> tuple[Tensor, int]:
    """phi with D m D^T phi = r, up to a residual of rms ``limit_B``, and the iterations that it took."""
    shape = (r_BXYZ.shape[1], r_BXYZ.shape[2], r_BXYZ.shape[3])
    inverse_xyz = inverse_laplacian(shape, operator).to(r_BXYZ)

    def precondition(x_BXYZ: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(x_BXYZ, dim=(1, 2, 3)) * inverse_xyz, s=shape, dim=(1, 2, 3))

    def dot(a_BXYZ: Tensor, b_BXYZ: Tensor) -> Tensor:
        return torch.einsum("bxyz,bxyz->b", a_BXYZ, b_BXYZ)[:, None, None, None]

    phi_BXYZ = torch.zeros_like(r_BXYZ)
    direction_BXYZ = z_BXYZ = precondition(r_BXYZ)
    rz = dot(r_BXYZ, z_BXYZ)
    for iteration in range(most):
        product_BXYZ = divergence(mask_B3XYZ * divergence_adjoint(direction_BXYZ, operator), operator)
        step = _ratio(rz, dot(direction_BXYZ, product_BXYZ))
        phi_BXYZ = phi_BXYZ.addcmul(step, direction_BXYZ)
        r_BXYZ = r_BXYZ.addcmul(step, product_BXYZ, value=-1)
        if not (_rms(r_BXYZ[:, None]) > limit_B).any():
            return phi_BXYZ, iteration + 1
        z_BXYZ = precondition(r_BXYZ)
        rz, before = dot(r_BXYZ, z_BXYZ), rz
        direction_BXYZ = z_BXYZ.addcmul(_ratio(rz, before), direction_BXYZ)
    return phi_BXYZ, most


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0: a sample that needs no further step takes none."""
    return torch.where(b > 0, a / b, 0.0)


def _rms(x_BCXYZ: Tensor) -> Tensor:
    """Root of the mean over space of the sum over components, [B]."""
    return x_BCXYZ.square().sum(1).flatten(1).mean(1).sqrt()


def _on_edges(solid_BXYZ: Tensor, own: int) -> Tensor:
    """1 on the edges of a component that touch a solid voxel."""
    for axis in {1, 2, 3} - {own}:
        solid_BXYZ = solid_BXYZ.maximum(solid_BXYZ.roll(1, axis))
    return solid_BXYZ


def _by_component(u_B3XYZ: Tensor, what: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each component, and its axis in [B, X, Y, Z], through ``what``."""
    return torch.stack([what(u, axis) for axis, u in zip((1, 2, 3), u_B3XYZ.unbind(1), strict=True)], 1)


def _transverse(u_B3XYZ: Tensor, side: float, middle: float) -> Tensor:
    """Each component weighted with (side, middle, side) along the two axes that are not its own."""

    def smooth(u_BXYZ: Tensor, own: int) -> Tensor:
        for axis in {1, 2, 3} - {own}:
            u_BXYZ = side * (u_BXYZ.roll(1, axis) + u_BXYZ.roll(-1, axis)) + middle * u_BXYZ
        return u_BXYZ

    return _by_component(u_B3XYZ, smooth)
