"""The scalar that a flow carries: advection and diffusion on the D3Q7 lattice by a numba kernel.

`kernels.lattice_boltzmann.scalar_step` defines the step and explains the choice of the relaxation. Blocks and
reproducibility are as in `solvers.kernel`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import DTypeLike, NDArray

from shodh_moe.kernels.compiled import compiled
from shodh_moe.kernels.lattice_boltzmann import scalar_rates

BLOCK = 256


class Scalar:
    """A scalar on the N fluid cells of one flow, zero at first.

    Args:
        table_QN: the first seven rows of the flow's `gather_table`, [7, N].
        diffusivity: lattice units, > 0.
        dtype: float32 or float64, of the populations.
    """

    def __init__(self, table_QN: NDArray[np.uint32], diffusivity: float, dtype: DTypeLike) -> None:
        self._table_QN = table_QN
        self._g_2F = np.zeros((2, table_QN.size), dtype)
        self._current = 0
        self._rates_2 = np.array(scalar_rates(diffusivity), dtype)

    def set(self, scalar_N: NDArray[np.floating], velocity_3N: NDArray[np.floating]) -> None:
        """Restart from scalar_N [N], in equilibrium with a flow of velocity_3N [3, N]."""
        rows = [scalar_N * (0.25 - (velocity_3N**2).sum(0))]
        for u_N in velocity_3N:
            rows += [scalar_N * (0.125 + (u_N * u_N + sign * u_N) / 2) for sign in (1, -1)]
        self._g_2F[self._current] = np.concatenate(rows)

    def step(self, velocity_3N: NDArray[np.floating], parallel: bool) -> None:
        """Advance one time step, given the flow's velocity_3N [3, N] at its end; ``parallel``: on all numba threads."""
        g_old, g_new = self._g_2F[self._current], self._g_2F[1 - self._current]
        advance = _advance_parallel if parallel else _advance_serial
        advance(g_old, g_new, self._table_QN, velocity_3N, self._rates_2)
        self._current = 1 - self._current

    def values(self) -> NDArray[np.floating]:
        """The scalar of each fluid cell, [N]."""
        return np.asarray(self._g_2F[self._current].reshape(7, -1).sum(0))


@compiled()
def _advance_block(block, n_fluid, g_old, g_new, table, velocity_3N, rates_2):  # type: ignore[no-untyped-def]
    real = g_old.dtype.type
    half = real(0.5)
    even_half, odd_half = half * rates_2[0], half * rates_2[1]
    low = np.uint64(block * BLOCK)
    n = min(BLOCK, n_fluid - block * BLOCK)
    tile = np.zeros((7 * BLOCK,), g_old.dtype)
    total = np.zeros(BLOCK, g_old.dtype)
    square = np.zeros(BLOCK, g_old.dtype)
    u = np.zeros(BLOCK, g_old.dtype)
    for q in range(7):
        row = np.uint64(q * n_fluid) + low
        for k in range(n):
            tile[q * BLOCK + k] = g_old[table[row + np.uint64(k)]]
        for k in range(BLOCK):
            total[k] += tile[q * BLOCK + k]
    for axis in range(3):
        for k in range(n):
            u[k] = velocity_3N[axis, low + np.uint64(k)]
        a = (2 * axis + 1) * BLOCK
        b = a + BLOCK
        for k in range(BLOCK):
            plus, minus = tile[a + k], tile[b + k]
            away_even = plus + minus - total[k] * (real(0.25) + u[k] * u[k])
            away_odd = plus - minus - total[k] * u[k]
            tile[a + k] = plus - even_half * away_even - odd_half * away_odd
            tile[b + k] = minus - even_half * away_even + odd_half * away_odd
            square[k] += u[k] * u[k]
    for k in range(BLOCK):
        tile[k] -= rates_2[0] * (tile[k] - total[k] * (real(0.25) - square[k]))
    for q in range(7):
        row = np.uint64(q * n_fluid) + low
        for k in range(n):
            g_new[row + np.uint64(k)] = tile[q * BLOCK + k]


@compiled()
def _advance_serial(g_old, g_new, table_QN, velocity_3N, rates_2):  # type: ignore[no-untyped-def]
    """Advance one time step from g_old into g_new, both [7 * n_fluid], on one thread."""
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for block in range((n_fluid + BLOCK - 1) // BLOCK):
        _advance_block(block, n_fluid, g_old, g_new, table, velocity_3N, rates_2)


@compiled(parallel=True)
def _advance_parallel(g_old, g_new, table_QN, velocity_3N, rates_2):  # type: ignore[no-untyped-def]
    """`_advance_serial` on all threads of numba."""
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for block in numba.prange((n_fluid + BLOCK - 1) // BLOCK):
        _advance_block(block, n_fluid, g_old, g_new, table, velocity_3N, rates_2)
