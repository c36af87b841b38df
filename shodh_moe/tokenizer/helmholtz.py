"""Make a raw velocity divergence-free: the last step of the Helmholtz decoder (DESIGN 3.1).

Shapes: B batch, 3 components, X Y Z space, periodic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.kernels import curl
from shodh_moe.tokenizer.laplacian import inverse_laplacian
from shodh_moe.tokenizer.walls import may_flow, project, ramp, to_centres, to_faces


def vector_potential(u_B3XYZ: Tensor, operator: str = "spectral") -> Tensor:
    """Return the vector potential A of u, [B, 3, X, Y, Z]: curl_D(A) is the divergence-free, zero-mean part of u.

    A = (-Laplace_D)^-1 curl_D^T(u), where D^T is the transposed derivative and -Laplace_D = D_x D_x^T + D_y D_y^T +
    D_z D_z^T: on divergence-free fields curl_D curl_D^T = -Laplace_D, and the other parts of u vanish. A is in the
    Coulomb gauge: its divergence taken with D^T is zero, which for the antisymmetric operators is div_D(A) = 0.
    Modes where every D vanishes (the mean; for even sizes and antisymmetric operators the Nyquist modes) have no
    potential.
    """
    rotation = curl(u_B3XYZ, operator=operator, adjoint=True)
    shape = (u_B3XYZ.shape[2], u_B3XYZ.shape[3], u_B3XYZ.shape[4])
    inverse = inverse_laplacian(shape, operator, rotation.dtype, rotation.device)
    return torch.fft.irfftn(torch.fft.rfftn(rotation, dim=(2, 3, 4)) * inverse, s=shape, dim=(2, 3, 4))


class Operations(NamedTuple):
    """What `conserved_velocity` is made of; `shodh_moe.inference.portable.velocity` has another set of them."""

    curl: Callable[..., Tensor]
    vector_potential: Callable[..., Tensor]
    project: Callable[..., Tensor]


KERNELS = Operations(curl, vector_potential, project)


def conserved_velocity(
    w_B3XYZ: Tensor, solid_B1XYZ: Tensor, operator: str, walls: str, by: Operations = KERNELS
) -> Tensor:
    """Return a velocity u close to w with div_D(u) = 0, [B, 3, X, Y, Z].

    For ``staggered`` each component of u is on the lower faces of the voxels, otherwise at their centres.

    Args:
        w_B3XYZ: velocity at voxel centres, zero in solids; float32 or float64, which is the result's dtype.
        solid_B1XYZ: 1 in solid voxels, 0 elsewhere; any dtype.
        operator: one of `kernels.differentiation.OPERATORS`; with walls a local one.
        walls: ``none``: u = curl_D(A) + Ubar with the potential and the mean of w; small in solids, not zero.
            ``ramp``: u = curl_D(ramp (A - A0)) + carrier; zero in solids. The carrier is the mean of w in all fluid
            voxels, made divergence-free; it is the only flow through throats. A0 is the mean of A where the ramp
            rises: the curl of a constant is zero, but a constant ramped up within a few cells would make a jet.
            ``exact``: the nearest such velocity (`walls.project`).
        by: how to compute it.
    """
    flows_B3XYZ = may_flow(solid_B1XYZ, operator)
    if operator == "staggered":
        w_B3XYZ = _on_faces(w_B3XYZ, flows_B3XYZ)
    if walls == "exact":
        return by.project(w_B3XYZ, solid_B1XYZ, operator)
    if walls == "none":
        return by.curl(by.vector_potential(w_B3XYZ, operator), w_B3XYZ.mean(dim=(2, 3, 4)), operator)
    constant_B3 = w_B3XYZ.sum(dim=(2, 3, 4)) / flows_B3XYZ.sum(dim=(2, 3, 4)).clamp(min=1)
    carrier_B3XYZ = by.project(constant_B3[:, :, None, None, None].expand_as(w_B3XYZ), solid_B1XYZ, operator)
    potential_B3XYZ = by.vector_potential(w_B3XYZ - carrier_B3XYZ, operator)
    factor = ramp(solid_B1XYZ.to(w_B3XYZ.dtype), operator)
    rises = factor * (1 - factor)
    share = rises / rises.sum(dim=(2, 3, 4), keepdim=True).clamp(min=torch.finfo(rises.dtype).tiny)
    at_walls = (share * potential_B3XYZ).sum(dim=(2, 3, 4), keepdim=True)
    return by.curl(factor * (potential_B3XYZ - at_walls), operator=operator) + carrier_B3XYZ


def at_centres(u_B3XYZ: Tensor, operator: str) -> Tensor:
    """Interpolate a `conserved_velocity` to voxel centres, where the data are."""
    return to_centres(u_B3XYZ) if operator == "staggered" else u_B3XYZ


def _on_faces(w_B3XYZ: Tensor, mask_B3XYZ: Tensor) -> Tensor:
    """Interpolate w from centres to faces, so that `to_centres` restores it up to fourth order."""
    faces_B3XYZ = mask_B3XYZ * to_faces(w_B3XYZ)
    return faces_B3XYZ + mask_B3XYZ * to_faces(w_B3XYZ - to_centres(faces_B3XYZ))
