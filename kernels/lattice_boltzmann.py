"""One time step of the lattice Boltzmann flow solver (D3Q19) and of the scalar it carries (D3Q7), on dense grids.

The flow: two relaxation times (TRT; Ginzburg, Verhaeghe, d'Humieres 2008) with the magic parameter 3/16, which puts
the wall of half-way bounce-back exactly between the last fluid and the first solid cell for every viscosity;
incompressible equilibrium (He and Luo 1997); body force (Guo, Zheng, Shi 2002). Lattice units: the cell size, the
time step and the mean density are 1.

The state holds the populations after collision, as deviations from rest: f - w. A step first pulls every population
from its upstream cell, then collides. The collision adds the whole force to the momentum, so the velocity of a state
is its momentum minus half the force of the step that made it (`velocity`); density and scalar are plain sums.
A step of the scalar uses the velocity at the end of the same step of the flow: step the flow, take `velocity`, step
the scalar.

The eddy viscosity (C delta)^2 |S|, with delta = 1 cell and |S| = sqrt(2 S:S), comes from the local stress (Hou,
Sterling, Chen, Doolen 1996; see `relaxation_time`), without damping at walls. With an eddy viscosity the odd rate is 1,
which puts the third moments into equilibrium, as regularised collisions do (Latt and Chopard 2006). With the magic
parameter they would persist for 1 / (16 viscosity) steps, longer than an eddy, and their stress would be mistaken for
shear: a channel flow at viscosity 5e-4 would have 7 to 30 % too little shear, instead of less than 1 % at rate 1. The
cost is that the position of the wall depends slightly on the viscosity: it is that of the magic parameter
1.5 (viscosity + eddy viscosity).

The scalar: TRT with the magic parameter 1/4, which makes the scheme stable at any diffusivity as long as its
equilibrium is not negative (Ginzburg, d'Humieres, Kuzmin 2010), here up to a speed of 1/2. The equilibrium contains the
squares u_a^2, which D3Q7 can represent, so diffusion along an axis does not depend on the flow along it. The
off-diagonal diffusion has an error of -4 u_a u_b D, second order in the velocity.

Direction 0 is at rest; the others are in opposite pairs (1, 2), (3, 4), .... The first seven directions are D3Q7.
Shapes: Q directions (19 or 7), 3 vector components, X Y Z space. float32 and float64, any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HALF = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (0, 1, 1), (0, 1, -1)]
VELOCITIES_Q3: NDArray[np.int64] = np.array(
    [(0, 0, 0)] + [sign * np.array(c) for c in _HALF for sign in (1, -1)], dtype=np.int64
)
WEIGHTS_Q: NDArray[np.float64] = np.array([1 / 3] + [1 / 18] * 6 + [1 / 36] * 12)
OPPOSITE_Q: NDArray[np.int64] = np.array([0] + [q + 1 if q % 2 else q - 1 for q in range(1, 19)])
Q = 19
SOUND_SPEED = 1 / np.sqrt(3.0)
MAGIC = 3 / 16

SCALAR_Q = 7
SCALAR_WEIGHTS_Q: NDArray[np.float64] = np.array([1 / 4] + [1 / 8] * 6)
SCALAR_MAGIC = 1 / 4

INDEX = {(int(c[0]), int(c[1]), int(c[2])): q for q, c in enumerate(VELOCITIES_Q3)}


def relaxation_rates(viscosity: float, smagorinsky: float = 0.0) -> tuple[float, float]:
    """Even and odd rate of the flow's collision: the viscosity sets the even rate, the magic parameter the odd one.

    With an eddy viscosity the odd rate is 1, and the even rate is that of a cell without shear.
    """
    return 1 / (3 * viscosity + 0.5), 1.0 if smagorinsky else 1 / (MAGIC / (3 * viscosity) + 0.5)


def scalar_rates(diffusivity: float) -> tuple[float, float]:
    """Even and odd rate of the scalar's collision. The diffusivity is (1 / odd - 1/2) / 4."""
    return 1 / (SCALAR_MAGIC / (4 * diffusivity) + 0.5), 1 / (4 * diffusivity + 0.5)


def step(
    f_QXYZ: Tensor,
    solid_XYZ: Tensor,
    force_3: Tensor | Sequence[float],
    viscosity: float,
    *,
    lid: bool = False,
    smagorinsky: float = 0.0,
    held_velocity_3XYZ: Tensor | None = None,
    rates: tuple[float, float] | None = None,
) -> Tensor:
    """The flow one time step later, [19, X, Y, Z]; zero in solid cells.

    Args:
        f_QXYZ: populations after collision minus their weights, float32 or float64.
        solid_XYZ: bool, True in solid cells (no slip).
        force_3: body force per volume, uniform in space.
        viscosity: kinematic viscosity, > 0.
        lid: make the top z face a free-slip lid, for which the bottom layer must be solid; otherwise z is periodic, as
            x and y always are.
        smagorinsky: the constant C of the eddy viscosity, usually 0.1 to 0.2; 0 for none.
        held_velocity_3XYZ: velocity to use in the collision instead of the flow's, so that only density and stress
            relax (Mei et al. 2006).
        rates: even and odd relaxation rate to use instead of those of viscosity and eddy viscosity.

    Raises:
        ValueError: a wrong shape, dtype or device, a viscosity <= 0, a lid without a solid bottom.
    """
    _check(f_QXYZ, solid_XYZ, Q, lid)
    if not viscosity > 0:
        raise ValueError(f"viscosity must be positive, not {viscosity}")
    force = torch.as_tensor(force_3, dtype=f_QXYZ.dtype, device=f_QXYZ.device).reshape(3, 1, 1, 1)
    f = _pull(f_QXYZ, solid_XYZ, lid)
    rho = f.sum(0)
    u = _momentum(f) + force / 2 if held_velocity_3XYZ is None else held_velocity_3XYZ

    even_rate: float | Tensor
    even_rate, odd_rate = rates or relaxation_rates(viscosity, smagorinsky)
    if smagorinsky and rates is None:
        time_XYZ = relaxation_time(f, rho, u, force, viscosity, smagorinsky)
        even_rate = 1 / time_XYZ
    square, power = (u * u).sum(0), (u * force).sum(0)
    out = torch.empty_like(f)
    for q in range(Q):
        w, opposite = float(WEIGHTS_Q[q]), int(OPPOSITE_Q[q])
        cu, cf = _along(q, u), _along(q, force)
        even = (f[q] + f[opposite]) / 2 - w * (rho + 4.5 * cu * cu - 1.5 * square)
        odd = (f[q] - f[opposite]) / 2 - w * 3 * cu
        even_force = w * (9 * cu * cf - 3 * power)
        odd_force = w * 3 * cf
        out[q] = f[q] - even_rate * even - odd_rate * odd
        out[q] += (1 - even_rate / 2) * even_force + (1 - odd_rate / 2) * odd_force
    return out.masked_fill(solid_XYZ, 0)


def relaxation_time(
    f_QXYZ: Tensor, rho_XYZ: Tensor, u_3XYZ: Tensor, force: Tensor, viscosity: float, smagorinsky: float
) -> Tensor:
    """The even relaxation time [X, Y, Z] with Smagorinsky's eddy viscosity, from populations before collision.

    The second moment of f - f_eq is P_ab = -(2/3) t S_ab - (u_a F_b + F_a u_b) / 2 (Guo, Zheng, Shi 2002, eq. 12 to
    17), S the rate of strain, t the result. With P' the part without the force, |S| = 3 / (2 t) sqrt(2 P':P'),
    and t = t0 + 3 C^2 |S| is a quadratic equation: t = (t0 + sqrt(t0^2 + 18 C^2 sqrt(2 P':P'))) / 2 (Hou et al.
    1996). ``rho_XYZ`` is the density minus 1; ``force`` [3, 1, 1, 1].
    """
    norm = torch.zeros_like(rho_XYZ)
    for a in range(3):
        for b in range(a, 3):
            moment = torch.zeros_like(rho_XYZ)
            for q in range(1, Q):
                sign = int(VELOCITIES_Q3[q, a] * VELOCITIES_Q3[q, b])
                if sign:
                    moment = moment + sign * f_QXYZ[q]
            if a == b:
                moment = moment - rho_XYZ / 3
            moment = moment - u_3XYZ[a] * u_3XYZ[b] + (u_3XYZ[a] * force[b] + force[a] * u_3XYZ[b]) / 2
            norm = norm + (1 if a == b else 2) * moment * moment
    t0 = 3 * viscosity + 0.5
    return (t0 + (t0 * t0 + 18 * smagorinsky**2 * (2 * norm).sqrt()).sqrt()) / 2


def equilibrium(velocity_3XYZ: Tensor, solid_XYZ: Tensor) -> Tensor:
    """Populations [19, X, Y, Z] of a flow with this velocity, density 1 and no stress; zero in solid cells."""
    square = (velocity_3XYZ**2).sum(0)
    out = []
    for q in range(Q):
        cu = _along(q, velocity_3XYZ)
        out.append(float(WEIGHTS_Q[q]) * (3 * cu + 4.5 * cu * cu - 1.5 * square))
    return torch.stack(out).masked_fill(solid_XYZ, 0)


def velocity(f_QXYZ: Tensor, force_3: Tensor | Sequence[float], solid_XYZ: Tensor) -> Tensor:
    """Velocity [3, X, Y, Z] of a state after a step with force ``force_3``; zero in solid cells.

    Pass a zero force for a state from `equilibrium` or from a step with a held velocity.
    """
    force = torch.as_tensor(force_3, dtype=f_QXYZ.dtype, device=f_QXYZ.device).reshape(3, 1, 1, 1)
    return (_momentum(f_QXYZ) - force / 2).masked_fill(solid_XYZ, 0)


def density(f_QXYZ: Tensor) -> Tensor:
    """Density [X, Y, Z]; 1 in solid cells."""
    return 1 + f_QXYZ.sum(0)


def pressure(f_QXYZ: Tensor) -> Tensor:
    """Pressure (density - 1) / 3 [X, Y, Z], computed without adding the 1; 0 in solid cells."""
    return f_QXYZ.sum(0) / 3


def scalar_step(
    g_QXYZ: Tensor, velocity_3XYZ: Tensor, solid_XYZ: Tensor, diffusivity: float, *, lid: bool = False
) -> Tensor:
    """The scalar one time step later, [7, X, Y, Z]; zero in solid cells. Nothing leaves through solids or the lid.

    Args:
        g_QXYZ: populations after collision, float32 or float64; their sum is the scalar.
        velocity_3XYZ: velocity of the flow at the end of this time step.
        solid_XYZ, lid: as for `step`.
        diffusivity: > 0.

    Raises:
        ValueError: a wrong shape, dtype or device, a diffusivity <= 0, a lid without a solid bottom.
    """
    _check(g_QXYZ, solid_XYZ, SCALAR_Q, lid)
    if not diffusivity > 0:
        raise ValueError(f"diffusivity must be positive, not {diffusivity}")
    g = _pull(g_QXYZ, solid_XYZ, lid)
    target = scalar_equilibrium(g.sum(0), velocity_3XYZ, solid_XYZ)
    even_rate, odd_rate = scalar_rates(diffusivity)
    out = torch.empty_like(g)
    for q in range(SCALAR_Q):
        opposite = int(OPPOSITE_Q[q])
        away, away_opposite = g[q] - target[q], g[opposite] - target[opposite]
        out[q] = g[q] - even_rate / 2 * (away + away_opposite) - odd_rate / 2 * (away - away_opposite)
    return out.masked_fill(solid_XYZ, 0)


def scalar_equilibrium(scalar_XYZ: Tensor, velocity_3XYZ: Tensor, solid_XYZ: Tensor) -> Tensor:
    """Populations [7, X, Y, Z] of the scalar c moving with the flow: c (1/8 +- u_a / 2 + u_a^2 / 2), zero in solids."""
    out = [scalar_XYZ * (float(SCALAR_WEIGHTS_Q[0]) - (velocity_3XYZ**2).sum(0))]
    for q in range(1, SCALAR_Q):
        cu = _along(q, velocity_3XYZ)
        out.append(scalar_XYZ * (float(SCALAR_WEIGHTS_Q[q]) + (cu + cu * cu) / 2))
    return torch.stack(out).masked_fill(solid_XYZ, 0)


def scalar(g_QXYZ: Tensor) -> Tensor:
    """The scalar [X, Y, Z], the sum of its populations; 0 in solid cells."""
    return g_QXYZ.sum(0)


def _pull(f_QXYZ: Tensor, solid_XYZ: Tensor, lid: bool) -> Tensor:
    """Pull every population from its upstream cell; if that is solid, take the opposite one of the same cell."""
    out = []
    for q in range(f_QXYZ.shape[0]):
        cx, cy, cz = (int(c) for c in VELOCITIES_Q3[q])
        came = f_QXYZ[q].roll((cx, cy, cz), (0, 1, 2))
        blocked = solid_XYZ.roll((cx, cy, cz), (0, 1, 2))
        if lid and cz == -1:
            # Mirrored: the population left the top layer upwards and returned from the lid half a cell above.
            came[:, :, -1] = f_QXYZ[INDEX[cx, cy, 1], :, :, -1].roll((cx, cy), (0, 1))
            blocked[:, :, -1] = solid_XYZ[:, :, -1].roll((cx, cy), (0, 1))
        out.append(torch.where(blocked, f_QXYZ[int(OPPOSITE_Q[q])], came))
    return torch.stack(out)


def _along(q: int, vector: Tensor) -> Tensor:
    """The component c_q . v of a vector v [3, ...]."""
    cx, cy, cz = (int(c) for c in VELOCITIES_Q3[q])
    return cx * vector[0] + cy * vector[1] + cz * vector[2]


def _momentum(f_QXYZ: Tensor) -> Tensor:
    parts = []
    for axis in range(3):
        up, down = np.flatnonzero(VELOCITIES_Q3[:, axis] > 0), np.flatnonzero(VELOCITIES_Q3[:, axis] < 0)
        parts.append(f_QXYZ[up.tolist()].sum(0) - f_QXYZ[down.tolist()].sum(0))
    return torch.stack(parts)


def _check(populations: Tensor, solid_XYZ: Tensor, directions: int, lid: bool) -> None:
    if solid_XYZ.ndim != 3 or solid_XYZ.dtype != torch.bool:
        raise ValueError(f"solid_XYZ must be bool [X, Y, Z], not {solid_XYZ.dtype} {list(solid_XYZ.shape)}")
    if populations.shape != (directions, *solid_XYZ.shape):
        raise ValueError(f"populations must be {[directions, *solid_XYZ.shape]}, not {list(populations.shape)}")
    if populations.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"populations must be float32 or float64, not {populations.dtype}")
    if populations.device != solid_XYZ.device:
        raise ValueError(f"populations are on {populations.device}, solid_XYZ on {solid_XYZ.device}")
    if lid and not solid_XYZ[:, :, 0].all():
        raise ValueError("a lid needs a solid bottom layer: solid_XYZ[:, :, 0] must be all True")
