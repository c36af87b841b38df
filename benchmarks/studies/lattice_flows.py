"""Flows of lattice_validation.py, each simulated in float64 and returned with its exact solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from shodh_moe.solvers import LatticeBoltzmann, exact
from shodh_moe.solvers.d3q19 import VELOCITIES_Q3
from shodh_moe.solvers.kernel import FREE
from shodh_moe.solvers.lattice_boltzmann import MAGIC, SOUND_SPEED

Array = NDArray[np.floating]
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # times at which a start-up flow is compared, in gap^2 / viscosity


@dataclass
class Case:
    """One convergence study: errors by size in cells, in the measure that ``norm`` names."""

    name: str
    norm: str
    viscosity: float
    sizes: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    reynolds: list[float] = field(default_factory=list)  # largest speed times size over viscosity
    mach: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)  # standard deviation of the error, if there are several samples

    def add(self, size: int, error: float, speed: float) -> None:
        self.sizes.append(size)
        self.errors.append(float(error))
        self.reynolds.append(float(speed) * size / self.viscosity)
        self.mach.append(float(speed / SOUND_SPEED))

    @property
    def orders(self) -> list[float]:
        pairs = pairwise(zip(self.sizes, self.errors, strict=True))
        return [math.log(e1 / e2) / math.log(n2 / n1) for (n1, e1), (n2, e2) in pairs if n1 != n2]


def relative(found: Array, expected: Array) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class OtherMagic(LatticeBoltzmann):
    """The solver with a different magic parameter, for flows that start from rest."""

    magic = MAGIC

    def run(self, force_T3: ArrayLike) -> None:
        even_time = 3 * self.viscosity
        rates = (1 / (even_time + 0.5), 1 / (self.magic / even_time + 0.5))
        self._advance(force_T3, self._velocity_3N, FREE, rates)


def flow(solid_XYZ: NDArray[np.bool_], viscosity: float, magic: float = MAGIC, lid: bool = False) -> LatticeBoltzmann:
    """The solver in float64."""
    if magic == MAGIC:
        return LatticeBoltzmann(solid_XYZ, viscosity, lid=lid, dtype=np.float64)
    other = OtherMagic(solid_XYZ, viscosity, lid=lid, dtype=np.float64)
    other.magic = magic
    return other


def bgk(viscosity: float) -> float:
    """Magic parameter at which both rates are equal, as with BGK's single relaxation time."""
    return (3 * viscosity) ** 2


def bed(gap: int, width: int = 1, walls: bool = False) -> NDArray[np.bool_]:
    """Solid mask of one layer under ``gap`` fluid cells, with a solid layer at the side if ``walls``."""
    solid_XYZ = np.zeros((1, width + walls, gap + 1), bool)
    solid_XYZ[:, :, 0] = True
    solid_XYZ[:, :1] |= walls
    return solid_XYZ


def heights(gap: int) -> Array:
    return np.arange(gap) + 0.5


def steady(moving: LatticeBoltzmann, force_3: Sequence[float] | Array, steps: int, tolerance: float = 1e-11) -> Array:
    """Velocity [3, X, Y, Z] of the steady flow, which ``steps`` more steps change by less than ``tolerance``."""
    before = moving.velocity()
    for _ in range(1000):
        moving.run(np.tile(force_3, (steps, 1)))
        now = moving.velocity()
        if np.abs(now - before).max() < tolerance * np.abs(now).max():
            return np.asarray(now)
        before = now
    raise RuntimeError("the flow did not become steady")


def straight(gap: int, viscosity: float, magic: float, speed: float = 0.02) -> tuple[Array, Array]:
    """Steady velocity [Z] of the plane channel, computed and exact; ``speed`` is the exact maximum."""
    force = 8 * viscosity * speed / gap**2
    found = steady(flow(bed(gap), viscosity, magic), [force, 0, 0], int(gap**2 / viscosity / 4) + 20)[0, 0, 0, 1:]
    return found, exact.poiseuille(heights(gap), gap, force, viscosity)


def wall_offset(found_Z: Array) -> float:
    """Distance in cells, outwards from the half-way wall, to the zero of the parabola through the profile."""
    roots = np.roots(np.polyfit(heights(len(found_Z)), found_Z, 2))
    return float(-np.sort(roots.real)[0])


def oblique(cells: int, rise: int, viscosity: float, magic: float = MAGIC) -> tuple[Array, Array]:
    """Velocity along a channel in direction (rise, 0, 1) with staircase walls: computed and exact, per fluid cell."""
    period = cells + 2 * rise
    x, _, z = np.meshgrid(np.arange(rise * period), [0], np.arange(period), indexing="ij")
    number_XYZ = (x - rise * z) % period  # length of the line of cells parallel to the walls
    solid_XYZ = number_XYZ >= cells
    along_3 = np.array([rise, 0, 1]) / math.hypot(rise, 1)
    gap = cells / math.hypot(rise, 1)  # preserves the area
    force = 8 * viscosity * 0.02 * 4 / cells / gap**2
    found = steady(flow(solid_XYZ, viscosity, magic), force * along_3, int(gap**2 / viscosity / 4) + 20)
    across = (number_XYZ[~solid_XYZ] + 0.5) / math.hypot(rise, 1)
    return np.tensordot(along_3, found, 1)[~solid_XYZ], exact.poiseuille(across, gap, force, viscosity)


def startup(gap: int, viscosity: float) -> tuple[Array, Array]:
    """Profiles [T, Z] at the times `SHARES`, computed and exact."""
    force = 8 * viscosity * 0.02 * 4 / gap**3
    moving, step, found, times = flow(bed(gap), viscosity), 0, [], []
    for share in SHARES:
        steps = round(share * gap**2 / viscosity) - step
        moving.run(np.tile([force, 0, 0], (steps, 1)))
        step += steps
        found.append(moving.velocity()[0, 0, 0, 1:])
        # A step adds half of the previous force and half of its own, so the first step adds only half a force.
        times.append(step - 0.5)
    return np.array(found), exact.startup(heights(gap), np.array(times), gap, force, viscosity)


def swinging_film(gap: int, viscosity: float, womersley: float) -> tuple[Array, Array]:
    """Eight profiles [8, Z] over a period, computed and exact, long after the start."""
    period = round(2 * math.pi * gap**2 / (womersley**2 * viscosity))
    omega, force = 2 * math.pi / period, 4e-4 * (4 / gap) ** 3
    force_T3 = np.zeros((period, 3))
    force_T3[:, 0] = force * np.cos(omega * np.arange(1, period + 1))
    moving = flow(bed(gap), viscosity, lid=True)
    for _ in range(math.ceil(8 * gap**2 / viscosity / period)):
        moving.run(force_T3)
    times = [round(period * eighth / 8) for eighth in range(9)]
    found = []
    for before, now in pairwise(times):
        moving.run(force_T3[before:now])
        found.append(moving.velocity()[0, 0, 0, 1:])
    return np.array(found), exact.oscillating_film(heights(gap), np.array(times[1:]), gap, force, viscosity, omega)


def open_channel_friction(depth: int, width: int) -> tuple[float, float]:
    """f Re (Darcy, hydraulic radius) of an open channel ``width`` depths wide, and its maximum speed."""
    solid_XYZ, force = bed(depth, width * depth, walls=True), 2e-3 * (4 / depth) ** 3
    along = steady(flow(solid_XYZ, 0.5, lid=True), [force, 0, 0], depth**2 + 20, 1e-9)[0]
    mean, radius = along[~solid_XYZ].mean(), width * depth / (width + 2)
    return float(8 * force * radius**2 / (mean * 0.5)), float(along.max())


def decay(start_3XYZ: Array, viscosity: float, rate: float, time_share: float) -> tuple[float, float]:
    """Relative error of the measured viscosity, and that of the velocity after ``time_share / rate`` steps."""
    moving = flow(np.zeros(start_3XYZ.shape[1:], bool), viscosity)
    moving.set_velocity(start_3XYZ, settle_pressure=True)
    first, last = round(0.2 * time_share / rate), round(time_share / rate)
    moving.run(np.zeros((first, 3)))
    before = (moving.velocity() * start_3XYZ).sum()
    moving.run(np.zeros((last - first, 3)))
    velocity_3XYZ = moving.velocity()
    found = math.log(before / (velocity_3XYZ * start_3XYZ).sum()) / (rate * (last - first)) - 1
    return found, relative(velocity_3XYZ, start_3XYZ * math.exp(-rate * last))


def sphere(n: int, fraction: float, shift_3: Sequence[float] = (0.0, 0.0, 0.0)) -> NDArray[np.bool_]:
    """Sphere of solid ``fraction`` in a periodic cube of n cells; a cell is solid if its centre is inside.

    The sphere's centre is ``shift_3`` cells from the middle of the cube.
    """
    offsets = [(np.arange(n) + 0.5 - shift) % n - n / 2 for shift in shift_3]
    squares_XYZ = offsets[0][:, None, None] ** 2 + offsets[1][:, None] ** 2 + offsets[2] ** 2
    return np.asarray(squares_XYZ < (n * exact.sphere_radius(fraction)) ** 2)


def permeability(solid_XYZ: NDArray[np.bool_], viscosity: float, magic: float = MAGIC) -> tuple[float, Array]:
    """Permeability along x, over n^2, of a cube of n^3 cells in Stokes flow, and the velocity [3, n, n, n].

    The mean velocity converges exponentially. Its limit is extrapolated from three values (Aitken) until it settles.
    """
    n = len(solid_XYZ)
    moving = flow(solid_XYZ, viscosity, magic)
    steps = max(20, round(0.01 * n**2 / viscosity))
    force = 5e-4 * viscosity**2 / n**3  # a Reynolds number of 1e-4 or less
    force_T3 = np.tile([force, 0, 0], (steps, 1))
    means, ends = [0.0, 0.0], [1.0]
    while len(means) < 7 or abs(ends[-1] / ends[-2] - 1) > 1e-4:
        moving.run(force_T3)
        means.append(float(moving.velocity()[0].mean()))
        last, slowed = means[-1] - means[-2], means[-1] - 2 * means[-2] + means[-3]
        ends.append(means[-1] - last**2 / slowed if slowed else means[-1])
    return ends[-1] * viscosity / (force * n**2), np.asarray(moving.velocity())


def wall_force(moving: LatticeBoltzmann) -> Array:
    """Force [Z] along x on the solid cells of each layer, in the latest step (momentum exchange, Ladd 1994).

    In half-way bounce-back each population that meets a wall is reversed and passes on twice its momentum.
    """
    solid_XYZ, f_QN = moving.solid_XYZ, moving._populations()
    cell_N3, force_Z = np.argwhere(~solid_XYZ), np.zeros(solid_XYZ.shape[2])
    for velocity_3, f_N in zip(VELOCITIES_Q3, f_QN, strict=True):
        to_N3 = cell_N3 + velocity_3
        inside_N = (to_N3[:, 2] < solid_XYZ.shape[2]) | (not moving.lid)
        to_N3 %= solid_XYZ.shape
        hit_N = inside_N & solid_XYZ[tuple(to_N3.T)]
        np.add.at(force_Z, to_N3[hit_N, 2], 2 * velocity_3[0] * f_N[hit_N])
    return force_Z


def drag(permeability_over_n2: float, fraction: float) -> float:
    """Drag coefficient K of Zick and Homsy."""
    return 1 / (6 * math.pi * exact.sphere_radius(fraction) * permeability_over_n2)


def published() -> Callable[[float], float]:
    """K at any fraction: cubic spline in fraction^(1/3) through Zick and Homsy's values and K = 1 at fraction 0."""
    fractions, drags = zip((0.0, 1.0), *exact.ZICK_HOMSY.items(), strict=True)
    spline = CubicSpline(np.cbrt(fractions), np.log(drags))
    return lambda fraction: float(np.exp(spline(np.cbrt(fraction))))


def hydrodynamic_radius(permeability_over_n2: float) -> float:
    """Radius, over n, of the sphere whose cubic array has this permeability."""
    known = published()

    def excess(radius: float) -> float:
        fraction = 4 / 3 * math.pi * radius**3
        return drag(permeability_over_n2, fraction) / known(fraction) - 1

    return float(brentq(excess, 0.05, 0.52))
