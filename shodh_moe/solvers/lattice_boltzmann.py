"""Lattice Boltzmann solver for unsteady incompressible flow through voxel geometries (D3Q19, CPU).

Two-relaxation-time collision (Ginzburg, Verhaeghe, d'Humieres 2008) with the magic parameter 3/16, which puts the
no-slip wall of half-way bounce-back exactly between the last fluid and the first solid cell for every viscosity;
incompressible equilibrium (He and Luo 1997); body force (Guo, Zheng, Shi 2002). Lattice units: the cell size, the
time step and the mean density are 1, the sound speed is 1/sqrt(3). `kernels.lattice_boltzmann` defines the step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from shodh_moe.kernels.lattice_boltzmann import MAGIC, relaxation_rates
from shodh_moe.solvers.d3q19 import SOUND_SPEED, VELOCITIES_Q3, WEIGHTS_Q, Q, gather_table
from shodh_moe.solvers.kernel import FREE, HOLD, KEEP, advance_parallel, advance_serial
from shodh_moe.solvers.limits import checked_mask, require_slow
from shodh_moe.solvers.scalar import Scalar
from shodh_moe.solvers.settling import STRESS_STEPS, settling

__all__ = ["MAGIC", "SOUND_SPEED", "LatticeBoltzmann"]


class LatticeBoltzmann:
    """A flow, at first at rest with unit density.

    Args:
        solid_XYZ: bool [X, Y, Z], True in solid voxels (no slip). At least one cell must be fluid.
        viscosity: kinematic, > 0, lattice units.
        lid: the top z face is a free-slip lid; the bottom layer solid_XYZ[:, :, 0] must then be solid.
            Without a lid all three axes are periodic.
        parallel: step with all of numba's threads; faster from about 64^3 on. The bits do not depend on it.
        dtype: float32 or float64, of the populations. They are stored as deviations from rest, so that float32
            resolves small speeds.
        smagorinsky: constant C of the eddy viscosity C^2 |S| (lattice units), 0 for none; 0.1 to 0.2 is usual.
        diffusivity: diffusivity of a scalar carried by the flow, lattice units; None for no scalar. The scalar is 0
            until `set_scalar`.

    Raises:
        ValueError: a mask that is not 3D or has no fluid, a viscosity or diffusivity <= 0, a constant < 0, a lid
            without a solid bottom.
    """

    def __init__(
        self,
        solid_XYZ: NDArray[np.bool_],
        viscosity: float,
        lid: bool = False,
        dtype: DTypeLike = np.float32,
        parallel: bool = False,
        smagorinsky: float = 0.0,
        diffusivity: float | None = None,
    ) -> None:
        solid_XYZ = checked_mask(solid_XYZ, viscosity, lid, smagorinsky, diffusivity)
        self.solid_XYZ = solid_XYZ
        self.viscosity = float(viscosity)
        self.lid = lid
        self.parallel = parallel
        self.dtype = np.dtype(dtype)
        self._fluid_XYZ = ~solid_XYZ
        self._table_QN = gather_table(solid_XYZ, lid)
        self._f_2F = np.zeros((2, self._table_QN.size), self.dtype)
        self._current = 0
        self._last_force_3 = np.zeros(3, self.dtype)
        self.smagorinsky = float(smagorinsky)
        self._velocity_3N = np.zeros((3, 1 if diffusivity is None else self.n_fluid), self.dtype)
        self._scalar = None if diffusivity is None else Scalar(self._table_QN[:7], diffusivity, self.dtype)

    @property
    def n_fluid(self) -> int:
        """Number of fluid cells."""
        return self._table_QN.shape[1]

    def run(self, force_T3: ArrayLike) -> None:
        """Advance one time step per row of force_T3 [T, 3], a body force per volume, uniform in space."""
        if self._scalar is None:
            self._advance(force_T3, self._velocity_3N, FREE)
            return
        for force_3 in np.asarray(force_T3, dtype=self.dtype).reshape(-1, 3):
            self._advance(force_3, self._velocity_3N, KEEP)
            self._scalar.step(self._velocity_3N, self.parallel)

    def step(self, force_3: ArrayLike) -> None:
        """Advance one time step under the body force force_3 [3]."""
        self.run(np.asarray(force_3)[None])

    def set_velocity(self, velocity_3XYZ: ArrayLike, settle_pressure: bool = False) -> None:
        """Restart the flow from velocity_3XYZ [3, X, Y, Z] (values in solid voxels are ignored).

        ``settle_pressure`` relaxes density and stresses with the velocity held fixed (Mei et al. 2006), so that the
        flow starts with its own pressure instead of a burst of sound.
        """
        frozen_3N = np.ascontiguousarray(np.asarray(velocity_3XYZ)[:, self._fluid_XYZ], dtype=self.dtype)
        cu_QN = VELOCITIES_Q3.astype(self.dtype) @ frozen_3N
        uu_N = (frozen_3N**2).sum(0)
        weights_Q1 = WEIGHTS_Q[:, None].astype(self.dtype)
        self._f_2F[self._current] = (weights_Q1 * (3 * cu_QN + 4.5 * cu_QN**2 - 1.5 * uu_N)).reshape(-1)
        self._last_force_3 = np.zeros(3, self.dtype)
        if settle_pressure:
            steps, rate = settling(self.solid_XYZ.shape, self.lid)
            self._advance(np.zeros((steps, 3)), frozen_3N, HOLD, (1.0, rate))
            self._advance(np.zeros((STRESS_STEPS, 3)), frozen_3N, HOLD)

    def set_scalar(self, scalar_XYZ: ArrayLike) -> None:
        """Start the scalar from scalar_XYZ [X, Y, Z] (solid voxels are ignored); call it after `set_velocity`.

        Raises:
            ValueError: the flow was made without a diffusivity, or ``scalar_XYZ`` has a wrong shape.
        """
        scalar_XYZ = np.asarray(scalar_XYZ, dtype=self.dtype)
        if scalar_XYZ.shape != self.solid_XYZ.shape:
            raise ValueError(f"the scalar must be {list(self.solid_XYZ.shape)}, not {list(scalar_XYZ.shape)}")
        self._carried().set(scalar_XYZ[self._fluid_XYZ], self.velocity()[:, self._fluid_XYZ])

    def scalar(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """The scalar [X, Y, Z]; zero in solid voxels. Raises ValueError for a flow made without a diffusivity."""
        out = np.zeros(self.solid_XYZ.shape, dtype or self.dtype)
        out[self._fluid_XYZ] = self._carried().values()
        return out

    def velocity(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """Velocity [3, X, Y, Z] after the last step, including half its force; zero in solid voxels."""
        dtype = dtype or self.dtype
        f_QN = self._populations()
        momentum_3N = np.einsum("qi,qn->in", VELOCITIES_Q3.astype(self.dtype), f_QN)
        out = np.zeros((3, *self.solid_XYZ.shape), dtype)
        # Populations are stored after collision, which has added the whole force to the momentum.
        out[:, self._fluid_XYZ] = momentum_3N - self._last_force_3[:, None] / 2
        return out

    def pressure(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """Pressure (rho - 1) / 3, [X, Y, Z]; zero in solid voxels."""
        out = np.zeros(self.solid_XYZ.shape, dtype or self.dtype)
        out[self._fluid_XYZ] = self._populations().sum(0, dtype=np.float64) / 3
        return out

    def mass(self) -> float:
        """Total mass over the fluid cells minus its value at rest, summed in float64."""
        return float(self._populations().sum(dtype=np.float64))

    def check(self, name: str) -> None:
        """Raise `DivergedError` naming the flow ``name`` if it is non-finite or faster than 0.3 anywhere."""
        require_slow(name, float(np.sqrt((self.velocity() ** 2).sum(0).max())))

    def _populations(self) -> NDArray[np.floating]:
        return self._f_2F[self._current].reshape(Q, -1)

    def _carried(self) -> Scalar:
        if self._scalar is None:
            raise ValueError("this flow carries no scalar: make it with a diffusivity")
        return self._scalar

    def _advance(
        self,
        force_T3: ArrayLike,
        velocity_3N: NDArray[np.floating],
        mode: int,
        rates: tuple[float, float] | None = None,
    ) -> None:
        """Advance one step per row of force_T3 with ``mode`` of `kernel.advance_serial`.

        Args:
            rates: even and odd rate, in place of those of the viscosity; the eddy viscosity is then off.
        """
        force_T3 = np.ascontiguousarray(force_T3, dtype=self.dtype).reshape(-1, 3)
        if not len(force_T3):
            return
        even, odd = rates or relaxation_rates(self.viscosity, self.smagorinsky)
        eddies = 0.0 if rates else 18 * 2**0.5 * self.smagorinsky**2
        advance = advance_parallel if self.parallel else advance_serial
        advance(
            self._f_2F,
            self._table_QN,
            VELOCITIES_Q3.astype(self.dtype),
            WEIGHTS_Q.astype(self.dtype),
            force_T3,
            velocity_3N,
            mode,
            np.array([even, odd, 3 * self.viscosity, eddies], self.dtype),
            self._current,
        )
        self._current = (self._current + len(force_T3)) % 2
        self._last_force_3 = force_T3[-1] if mode != HOLD else np.zeros(3, self.dtype)
