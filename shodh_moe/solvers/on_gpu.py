"""The lattice Boltzmann solver on a GPU: `LatticeBoltzmann` with Triton's kernels on a dense grid.

At 64^3 a time step takes about as long on a GPU as its launch in Python, so long runs replay a CUDA graph of
`GRAPH_STEPS` steps. Without a GPU the kernels run in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.kernels import lattice_boltzmann as reference
from shodh_moe.solvers.limits import checked_mask, require_slow
from shodh_moe.solvers.settling import STRESS_STEPS, settling

GRAPH_STEPS = 32  # even, so that a graph ends in the buffer that it started from


class LatticeBoltzmannGPU:
    """A flow, at first at rest with unit density, with the methods of `LatticeBoltzmann`.

    Solid cells take as much memory as fluid cells: (2 * 19 * 4 + 5) bytes per cell in float32.

    Args:
        solid_XYZ: bool [X, Y, Z], True in solid voxels (no slip). At least one cell must be fluid.
        viscosity: kinematic, > 0, lattice units.
        lid: the top z face is a free-slip lid; the bottom layer solid_XYZ[:, :, 0] must then be solid.
            Without a lid all three axes are periodic.
        dtype: float32 or float64, of the populations.
        smagorinsky: constant of the eddy viscosity in cells, 0 for none; 0.1 to 0.2 is usual.
        diffusivity: diffusivity of a scalar carried by the flow, lattice units; None for no scalar. The scalar is 0
            until `set_scalar`.
        device: a GPU, or ``cpu`` under Triton's interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ValueError: as for `LatticeBoltzmann`.
        UserError: no Triton, or the device cannot be used.
    """

    def __init__(
        self,
        solid_XYZ: NDArray[np.bool_],
        viscosity: float,
        lid: bool = False,
        dtype: DTypeLike = np.float32,
        smagorinsky: float = 0.0,
        diffusivity: float | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        solid_XYZ = checked_mask(solid_XYZ, viscosity, lid, smagorinsky, diffusivity)
        self.device = torch.device(device)
        self._kernels = _kernels(self.device)
        self.solid_XYZ = solid_XYZ
        self.viscosity = float(viscosity)
        self.lid = lid
        self.dtype = np.dtype(dtype)
        self.smagorinsky = float(smagorinsky)
        self.n_fluid = int((~solid_XYZ).sum())
        self._shape = (solid_XYZ.shape[0], solid_XYZ.shape[1], solid_XYZ.shape[2])
        self._solid = torch.from_numpy(solid_XYZ.copy()).to(self.device)
        self._word_N = self._kernels.cell_words(self._solid, lid)
        # Two tensors, not halves of one: Triton compiles different code for a tensor that is not aligned to 16 bytes.
        self._f = [self._zeros(reference.Q), self._zeros(reference.Q)]
        self._current = 0
        self._last_force_3 = np.zeros(3, self.dtype)
        self._rates_4 = self._kernels.flow_rates(viscosity, smagorinsky, self._f[0])
        self._velocity_3N: Tensor | None = None
        self._g: list[Tensor] = []
        if diffusivity is not None:
            self._velocity_3N = self._zeros(3)
            self._g = [self._zeros(reference.SCALAR_Q), self._zeros(reference.SCALAR_Q)]
            self._scalar_rates_2 = self._g[0].new_tensor(reference.scalar_rates(diffusivity))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_force_T4 = torch.zeros(GRAPH_STEPS, 4, dtype=self._f[0].dtype, device=self.device)

    def run(self, force_T3: ArrayLike) -> None:
        """Advance one time step per row of force_T3 [T, 3], a body force per volume, uniform in space."""
        force_T3 = np.asarray(force_T3, dtype=self.dtype).reshape(-1, 3)
        if not len(force_T3):
            return
        # Four numbers per row, so that all rows have the same alignment to 16 bytes.
        force_T4 = self._tensor(np.pad(force_T3, ((0, 0), (0, 1))))
        total, done = len(force_T4), 0
        while done < total:
            # Run once before recording, since kernels are compiled at their first launch.
            ready = uses_graphs(self.device) and (self._graph is not None or done > 0)
            if ready and self._current == 0 and total - done >= GRAPH_STEPS:
                self._replay(force_T4[done : done + GRAPH_STEPS])
                done += GRAPH_STEPS
            else:
                self._step(force_T4[done])
                done += 1
        self._last_force_3 = force_T3[-1]

    def step(self, force_3: ArrayLike) -> None:
        """Advance one time step under the body force force_3 [3]."""
        self.run(np.asarray(force_3)[None])

    def set_velocity(self, velocity_3XYZ: ArrayLike, settle_pressure: bool = False) -> None:
        """Restart the flow from velocity_3XYZ [3, X, Y, Z]; see `LatticeBoltzmann.set_velocity`."""
        velocity = self._tensor(velocity_3XYZ)
        self._f[self._current].copy_(reference.equilibrium(velocity, self._solid).flatten(1))
        self._last_force_3 = np.zeros(3, self.dtype)
        if settle_pressure:
            held_3N = velocity.flatten(1)
            steps, rate = settling(self._shape, self.lid)
            self._hold(held_3N, steps, self._rates_4.new_tensor([1.0, rate, 0.0, 0.0]), eddies=False)
            self._hold(held_3N, STRESS_STEPS, self._rates_4, eddies=self.smagorinsky > 0)

    def set_scalar(self, scalar_XYZ: ArrayLike) -> None:
        """Start the scalar from scalar_XYZ [X, Y, Z] (solid voxels are ignored); call it after `set_velocity`.

        Raises:
            ValueError: the flow was made without a diffusivity, or ``scalar_XYZ`` has a wrong shape.
        """
        scalar = self._tensor(scalar_XYZ)
        if scalar.shape != self._shape:
            raise ValueError(f"the scalar must be {list(self._shape)}, not {list(scalar.shape)}")
        populations = reference.scalar_equilibrium(scalar, self._velocity(), self._solid)
        self._scalar_populations().copy_(populations.flatten(1))

    def scalar(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """The scalar [X, Y, Z]; zero in solid voxels. Raises ValueError for a flow made without a diffusivity."""
        return self._array(self._scalar_populations().sum(0).view(self._shape), dtype)

    def velocity(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """Velocity [3, X, Y, Z] after the last step, including half its force; zero in solid voxels."""
        return self._array(self._velocity(), dtype)

    def pressure(self, dtype: DTypeLike | None = None) -> NDArray[np.floating]:
        """Pressure (rho - 1) / 3, [X, Y, Z]; zero in solid voxels."""
        return self._array(self._f[self._current].sum(0, dtype=torch.float64).view(self._shape) / 3, dtype)

    def mass(self) -> float:
        """Total mass over the fluid cells minus its value at rest, summed in float64."""
        return float(self._f[self._current].sum(dtype=torch.float64))

    def check(self, name: str) -> None:
        """Raise `DivergedError` naming the flow ``name`` if it is non-finite or faster than 0.3 anywhere."""
        require_slow(name, float(self._velocity().square().sum(0).max().sqrt()))

    def _zeros(self, rows: int) -> Tensor:
        dtype = torch.float64 if self.dtype == np.float64 else torch.float32
        return torch.zeros(rows, self.solid_XYZ.size, dtype=dtype, device=self.device)

    def _velocity(self) -> Tensor:
        f_QXYZ = self._f[self._current].view(reference.Q, *self._shape)
        return reference.velocity(f_QXYZ, self._last_force_3.tolist(), self._solid)

    def _tensor(self, values: ArrayLike) -> Tensor:
        return torch.from_numpy(np.array(values, self.dtype, order="C")).to(self.device)

    def _array(self, values: Tensor, dtype: DTypeLike | None) -> NDArray[np.floating]:
        return values.cpu().numpy().astype(dtype or self.dtype, copy=False)

    def _scalar_populations(self) -> Tensor:
        if not self._g:
            raise ValueError("this flow carries no scalar: make it with a diffusivity")
        return self._g[self._current]

    def _flow_step(
        self, force_4: Tensor, rates_4: Tensor, velocity_3N: Tensor | None, eddies: bool, held: bool = False
    ) -> None:
        """Step only the flow, from its current buffer into the other one."""
        switches = {"lid": self.lid, "eddies": eddies, "held": held}
        f_QN, out_QN = self._f[self._current], self._f[1 - self._current]
        self._kernels.step(f_QN, out_QN, self._word_N, self._shape, force_4, rates_4, velocity_3N, **switches)

    def _step(self, force_4: Tensor) -> None:
        now, then = self._current, 1 - self._current
        self._flow_step(force_4, self._rates_4, self._velocity_3N, eddies=self.smagorinsky > 0)
        if self._velocity_3N is not None:
            self._kernels.scalar_step(
                self._g[now],
                self._g[then],
                self._word_N,
                self._shape,
                self._velocity_3N,
                self._scalar_rates_2,
                lid=self.lid,
            )
        self._current = then

    def _replay(self, force_T4: Tensor) -> None:
        """Run `GRAPH_STEPS` steps as one graph, which is recorded at the first call and reads forces from a buffer."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                for force_4 in self._graph_force_T4:
                    self._step(force_4)
            self._graph = graph
        self._graph_force_T4.copy_(force_T4)
        self._graph.replay()

    def _hold(self, velocity_3N: Tensor, steps: int, rates_4: Tensor, eddies: bool) -> None:
        """Step the flow without force and with its velocity held; the scalar is not stepped."""
        force_4 = rates_4.new_zeros(4)
        for _ in range(steps):
            self._flow_step(force_4, rates_4, velocity_3N, eddies, held=True)
            self._current = 1 - self._current
        if self._g and steps % 2:  # the graph refers to the scalar's buffers by address, so they cannot be swapped
            self._g[self._current].copy_(self._g[1 - self._current])


def uses_graphs(device: torch.device) -> bool:
    """Whether the solver replays CUDA graphs on ``device``."""
    return device.type == "cuda"


def _kernels(device: torch.device) -> ModuleType:
    """Import the Triton kernels. Raises UserError if they cannot run on ``device``."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("the GPU solver needs Triton, which is not installed: pip install 'shodh_moe[triton]'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the GPU solver was asked for {device}, but torch finds no GPU: use LatticeBoltzmann")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"the GPU solver cannot run on {device}: give it a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    from shodh_moe.kernels import lattice_boltzmann_triton

    return lattice_boltzmann_triton
