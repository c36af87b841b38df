"""Shallow water over a flat bed: dam breaks onto a wet or a dry bed.

    h_t + div(h u) = 0        (h u)_t + div(h u u + g h^2 / 2) = 0

Finite volumes: depth and velocity reconstructed with the monotonised central limiter (MUSCL), HLL fluxes with
Einfeldt's wave speeds, Heun's method (SSP-RK2) with a separate time step for each trajectory. HLL with these speeds
satisfies the entropy condition, so a transonic rarefaction contains no spurious shock and needs no further fix. It also
keeps depths non-negative; beside a dry cell, the wave speeds are those of a dry front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.solvers.limits import DivergedError
from shodh_moe.solvers.planar.checks import first_bad, require_finite, require_input

CHANNELS = ("depth", "momentum_x", "momentum_y")


@dataclass(frozen=True)
class ShallowWater:
    """Constants of the equation and of the solver.

    Attributes:
        side: length of the square, [-side/2, side/2]^2.
        gravity: g where another parameter varies by trajectory; `simulate` takes the g of each trajectory.
        walls: ``outflow`` (the fields continue unchanged beyond the edge) or ``reflective``.
        courant: time step times (fastest wave in x / dx + in y / dy); at most 0.5 keeps depths non-negative.
        dry: a cell of at most this depth is at rest.
        outer_height: depth around the dam.
        radius: smallest and largest radius of a random dam.
        centre: the centre of a random dam is in [-centre, centre]^2.
    """

    side: float = 5.0
    gravity: float = 1.0
    walls: Literal["outflow", "reflective"] = "outflow"
    courant: float = 0.4
    dry: float = 1e-6
    outer_height: float = 1.0
    radius: tuple[float, float] = (0.5, 1.0)
    centre: float = 1.0


def random_initial(
    seeds: Sequence[np.random.SeedSequence], height_B: Tensor, grid: int, settings: ShallowWater | None = None
) -> Tensor:
    """Draw cylinders of water at rest of depth ``height_B``, random radius and centre: [B, 3, grid, grid] float64.

    The depth of each cell is the mean over 8 x 8 points.
    """
    settings = settings or ShallowWater()
    fine = 8
    x = torch.from_numpy((np.arange(grid * fine) + 0.5) * settings.side / (grid * fine) - settings.side / 2)
    fields = torch.zeros(len(seeds), 3, grid, grid, dtype=torch.float64)
    for row, seed, height in zip(fields, seeds, height_B.tolist(), strict=True):
        generator = np.random.default_rng(seed)
        radius = generator.uniform(*settings.radius)
        centre_x, centre_y = generator.uniform(-settings.centre, settings.centre, 2)
        inside = ((x - centre_x) ** 2 + (x[:, None] - centre_y) ** 2 <= radius**2).double()
        share = inside.view(grid, fine, grid, fine).mean((1, 3))
        row[0] = settings.outer_height + (height - settings.outer_height) * share
    return fields


def simulate(
    initial_BCHW: Tensor,
    gravity_B: Tensor,
    snapshots: int,
    interval: float,
    settings: ShallowWater | None = None,
) -> Tensor:
    """Depth and momenta at times 0, interval, ..., (snapshots - 1) interval: [B, T, 3, H, W], channels `CHANNELS`.

    Args:
        initial_BCHW: cell means of h, h u, h v, float32 or float64; h >= 0.
        gravity_B: g > 0 of each trajectory.

    Raises:
        UserError: an argument has a wrong shape or value (see `checks.require_input`), a depth is negative, or a
            setting is out of range.
        DivergedError: a trajectory is not finite or too fast; the message names it.
    """
    settings = settings or ShallowWater()
    gravity_B = require_input(initial_BCHW, 3, gravity_B, "gravity", snapshots, interval)
    bad = first_bad((initial_BCHW[:, 0] >= 0).flatten(1).all(1))
    if bad is not None:
        raise UserError(f"trajectory {bad} has a negative depth: initial channels are depth, momentum_x, momentum_y")
    if not 0 < settings.courant <= 0.5:
        raise UserError(f"courant is {settings.courant}: give a number above 0 and at most 0.5")
    if settings.walls not in ("outflow", "reflective"):
        raise UserError(f"walls are {settings.walls!r}: choose outflow or reflective")
    gravity = gravity_B[:, None, None]
    state = initial_BCHW
    fields = [state]
    for snapshot in range(1, snapshots):
        left_B = torch.full_like(gravity_B, interval)
        while bool((left_B > 0).any()):
            rate, speed_B = _rate(state, gravity, settings)
            longest_B = settings.courant / speed_B
            bad = first_bad(longest_B > 1e-7 * interval)
            if bad is not None:
                time = snapshot * interval - left_B[bad].item()
                raise DivergedError(
                    f"trajectory {bad} of {len(state)} is not finite or too fast at time {time:g}: "
                    "give the settings a smaller courant, or the initial fields smaller velocities"
                )
            # A trajectory that has reached the snapshot takes steps of length zero, which leave its bits unchanged.
            step_B = torch.where(longest_B < left_B, longest_B, left_B)
            step = step_B[:, None, None, None]
            guess = _at_rest_where_dry(state + step * rate, settings.dry)
            again, _ = _rate(guess, gravity, settings)
            moved = _at_rest_where_dry(0.5 * (state + (guess + step * again)), settings.dry)
            state = torch.where(step > 0, moved, state)
            left_B = left_B - step_B
        require_finite(state, snapshot * interval, "give the settings a smaller courant")
        fields.append(state)
    return torch.stack(fields, 1)


def _at_rest_where_dry(state: Tensor, dry: float) -> Tensor:
    depth = state[:, :1].clamp(min=0.0)  # below zero only by rounding
    return torch.cat((depth, torch.where(depth > dry, state[:, 1:], torch.zeros_like(state[:, 1:]))), 1)


def _rate(state: Tensor, gravity: Tensor, settings: ShallowWater) -> tuple[Tensor, Tensor]:
    """Time derivative of the cell means, and max |s_x| / dx + max |s_y| / dy, the fastest waves of each trajectory."""
    h, mx, my = state.unbind(1)
    wet = h > settings.dry
    depth = torch.where(wet, h, torch.ones_like(h))
    u, v = (torch.where(wet, m / depth, torch.zeros_like(m)) for m in (mx, my))
    dx, dy = settings.side / h.shape[-1], settings.side / h.shape[-2]
    (hx, mxx, myx), speed_x = _sweep(h, u, v, gravity, settings)
    (hy, myy, mxy), speed_y = _sweep(h.mT, v.mT, u.mT, gravity, settings)
    rate = torch.stack((hx / dx + hy.mT / dy, mxx / dx + mxy.mT / dy, myx / dx + myy.mT / dy), 1)
    return rate, speed_x / dx + speed_y / dy


def _sweep(
    h: Tensor, u: Tensor, v: Tensor, gravity: Tensor, settings: ShallowWater
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Inflow minus outflow of h, h u and h v along the last axis (u is the velocity along it), and the fastest wave."""
    reflect = settings.walls == "reflective"
    (h_l, h_r), (u_l, u_r), (v_l, v_r) = (
        _faces(q, sign if reflect else 0.0) for q, sign in ((h, 1.0), (u, -1.0), (v, 1.0))
    )
    c_l, c_r = torch.sqrt(gravity * h_l), torch.sqrt(gravity * h_r)
    root_l, root_r = torch.sqrt(h_l), torch.sqrt(h_r)
    roots = root_l + root_r
    wet = roots > 0
    u_roe = torch.where(wet, (root_l * u_l + root_r * u_r) / torch.where(wet, roots, torch.ones_like(roots)), 0.0)
    c_roe = torch.sqrt(0.5 * gravity * (h_l + h_r))
    # Einfeldt's speeds; beside a dry cell the front runs at twice the wave speed of the wet side.
    s_l = torch.where(h_l > settings.dry, torch.minimum(u_l - c_l, u_roe - c_roe), u_r - 2 * c_r)
    s_r = torch.where(h_r > settings.dry, torch.maximum(u_r + c_r, u_roe + c_roe), u_l + 2 * c_l)
    s_l, s_r = s_l.clamp(max=0.0), s_r.clamp(min=0.0)
    spread = s_r - s_l
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    q_l, q_r = h_l * u_l, h_r * u_r
    pressure_l, pressure_r = 0.5 * gravity * h_l * h_l, 0.5 * gravity * h_r * h_r

    def hll(flux_l: Tensor, flux_r: Tensor, jump: Tensor) -> Tensor:
        flux = (s_r * flux_l - s_l * flux_r + s_l * s_r * jump) / spread
        return flux[..., :-1] - flux[..., 1:]

    changes = (
        hll(q_l, q_r, h_r - h_l),
        hll(q_l * u_l + pressure_l, q_r * u_r + pressure_r, q_r - q_l),
        hll(q_l * v_l, q_r * v_r, h_r * v_r - h_l * v_l),
    )
    return changes, torch.maximum(-s_l, s_r).amax((-2, -1))


def _faces(q: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Values on the left and on the right of the N + 1 faces along the last axis.

    Beyond the ends, ``q`` continues as ``sign`` times its mirror image; with sign 0, as its last value.
    """
    first, last = q[..., :1], q[..., -1:]
    if sign:
        padded = torch.cat((sign * q[..., 1:2], sign * first, q, sign * last, sign * q[..., -2:-1]), -1)
    else:
        padded = torch.cat((first, first, q, last, last), -1)
    jumps = padded.diff(dim=-1)
    back, ahead = jumps[..., :-1], jumps[..., 1:]
    # Monotonised central limiter: the smallest of twice either jump and of their mean, zero at an extremum.
    size = torch.minimum(2 * torch.minimum(back.abs(), ahead.abs()), 0.5 * (back + ahead).abs())
    slope = torch.where(back * ahead > 0, torch.copysign(size, back), torch.zeros_like(size))
    inner = padded[..., 1:-1]
    return (inner + 0.5 * slope)[..., :-1], (inner - 0.5 * slope)[..., 1:]
