"""Reference solutions for the planar solvers: exact ones, and a fine one-dimensional one where none is known."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def taylor_green(size: int, side: float, waves: int, viscosity: Tensor, time: float) -> Tensor:
    """Vorticity of decaying vortices of unit amplitude, [B, 1, size, size] float64 for viscosities [B]."""
    k = 2 * math.pi * waves / side
    x = k * side / size * torch.arange(size, dtype=torch.float64)
    decay = torch.exp(-2 * viscosity.double() * k**2 * time)
    return decay[:, None, None, None] * (torch.cos(x) * torch.cos(x[:, None]))


def forced_shear(force_HW: Tensor, side: float, viscosity: Tensor, time: float) -> Tensor:
    """Vorticity [B, 1, H, W] of a flow at rest after ``time`` under the diagonal force of `navier_stokes.forcing`."""
    rate = viscosity.double() * 2 * (2 * math.pi / side) ** 2
    return (-torch.expm1(-rate * time) / rate)[:, None, None, None] * force_HW


def stoker(x: Tensor, time: float, left: float, right: float, gravity: float) -> tuple[Tensor, Tensor]:
    """Depth and velocity at ``x`` of a dam break at x = 0 from depth ``left`` onto ``right`` > 0 (Stoker 1957).

    ``time`` must be positive.
    """
    c_l = math.sqrt(gravity * left)

    def behind(h: float) -> tuple[float, float]:
        """Velocity behind the rarefaction minus that behind the shock (decreasing in h), and the former alone."""
        u = 2 * (c_l - math.sqrt(gravity * h))
        return u - (h - right) * math.sqrt(gravity / 2 * (1 / h + 1 / right)), u

    low, high = right, left
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if behind(middle)[0] > 0 else (low, middle)
    h, u = 0.5 * (low + high), behind(0.5 * (low + high))[1]
    shock = h * u / (h - right)
    xi = x / time
    depth, velocity = _rarefaction(xi, c_l, gravity)
    tail = u - math.sqrt(gravity * h)
    depth, velocity = torch.where(xi < tail, depth, h), torch.where(xi < tail, velocity, u)
    return torch.where(xi < shock, depth, right), torch.where(xi < shock, velocity, 0.0)


def ritter(x: Tensor, time: float, left: float, gravity: float) -> tuple[Tensor, Tensor]:
    """Depth and velocity at ``x`` of a dam break at x = 0 from depth ``left`` onto a dry bed (Ritter 1892).

    ``time`` must be positive.
    """
    c_l = math.sqrt(gravity * left)
    depth, velocity = _rarefaction(x / time, c_l, gravity)
    wet = x / time < 2 * c_l
    return torch.where(wet, depth, 0.0), torch.where(wet, velocity, 0.0)


def _rarefaction(xi: Tensor, c_l: float, gravity: float) -> tuple[Tensor, Tensor]:
    xi = xi.clamp(min=-c_l)
    return (2 * c_l - xi) ** 2 / (9 * gravity), 2 / 3 * (xi + c_l)


def simple_wave(x: Tensor, time: float, gravity: float, amplitude: float, width: float) -> tuple[Tensor, Tensor]:
    """Depth and velocity at ``x`` of a smooth wave that runs right into still water of unit depth, before it breaks.

    At time 0 the depth is 1 + amplitude exp(-(x / width)^2); at all times u = 2 (sqrt(g h) - sqrt(g)).
    """
    start = x.clone()
    # Fixed point of start = x - speed(start) t: contracts as long as the wave has not broken.
    for _ in range(200):
        depth = 1 + amplitude * torch.exp(-((start / width) ** 2))
        start = x - (3 * torch.sqrt(gravity * depth) - 2 * math.sqrt(gravity)) * time
    depth = 1 + amplitude * torch.exp(-((start / width) ** 2))
    return depth, 2 * (torch.sqrt(gravity * depth) - math.sqrt(gravity))


def linear_modes(
    rows: int, columns: int, side: float, diffusivities: tuple[float, float], start: tuple[float, float], time: float
) -> Tensor:
    """Amplitudes (u, v) of a cosine mode after ``time`` in linearised FitzHugh-Nagumo, which holds for small fields.

    Linearised means without the cubic term and without the threshold.

    Args:
        rows, columns: half waves of the mode along each axis.
        side: length of the square.
        diffusivities: D_u and D_v.
        start: amplitudes (u, v) at time 0.

    Returns:
        [2], float64.
    """
    k2 = (math.pi / side) ** 2 * (rows**2 + columns**2)
    d_u, d_v = diffusivities
    matrix = torch.tensor([[1 - d_u * k2, -1.0], [1.0, -1 - d_v * k2]], dtype=torch.float64)
    return torch.linalg.matrix_exp(time * matrix) @ torch.tensor(start, dtype=torch.float64)


def radial_dam_break(
    inner: float, outer: float, radius: float, gravity: float, time: float, cells: int = 4000, extent: float = 3.6
) -> tuple[np.ndarray, np.ndarray]:
    """Radii and depths [cells] of a circular dam break, from the radial equations by Rusanov's first-order scheme.

    Args:
        inner, outer: initial depths inside and outside ``radius``.
        cells, extent: number of cells in r, and the largest r.
    """
    dr = extent / cells
    r = (np.arange(cells) + 0.5) * dr
    faces = np.arange(cells + 1) * dr
    h, q, now = np.where(r < radius, inner, outer).astype(float), np.zeros(cells), 0.0
    while now < time:
        # Mirrored at the axis, open at the end.
        hp, qp = np.concatenate((h[:1], h, h[-1:])), np.concatenate((-q[:1], q, q[-1:]))
        u = qp / hp
        speed = np.abs(u) + np.sqrt(gravity * hp)
        step = min(0.9 * dr / speed.max(), time - now)
        s = np.maximum(speed[1:], speed[:-1])
        pressure = 0.5 * gravity * hp**2
        mass = 0.5 * (qp[1:] + qp[:-1]) - 0.5 * s * (hp[1:] - hp[:-1])
        momentum = 0.5 * ((qp * u + pressure)[1:] + (qp * u + pressure)[:-1]) - 0.5 * s * (qp[1:] - qp[:-1])
        # Rings: fluxes weighted by the radius of their face; pressure pushes on the sides of a sector too.
        q = q - step / (r * dr) * ((faces * momentum)[1:] - (faces * momentum)[:-1]) + step * 0.5 * gravity * h**2 / r
        h = h - step / (r * dr) * ((faces * mass)[1:] - (faces * mass)[:-1])
        now += step
    return r, h
