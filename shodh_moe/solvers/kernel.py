"""The numba kernel of the lattice Boltzmann solver: gather, collide, force, one pass over the fluid cells.

Cells are worked on in fixed blocks that fit the first-level cache, and no cell depends on another of the same time
step: the result has the same bits for any number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from shodh_moe.kernels.compiled import compiled

BLOCK = 128


@compiled()
def _advance_block(block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_3, frozen_3N, freeze, rates_2):  # type: ignore[no-untyped-def]
    """One time step of the fluid cells ``block * BLOCK`` and following, from f_old into f_new, both [19 * n_fluid]."""
    real = f_old.dtype.type
    half = real(0.5)
    gx, gy, gz = force_3[0], force_3[1], force_3[2]
    omega_even, omega_odd = rates_2[0], rates_2[1]
    low = np.uint64(block * BLOCK)
    n = min(BLOCK, n_fluid - block * BLOCK)
    # Everything the cells of this block need, one first-level cache full.
    tile = np.zeros((19 * BLOCK,), f_old.dtype)
    rho = np.zeros(BLOCK, f_old.dtype)
    ux = np.zeros(BLOCK, f_old.dtype)
    uy = np.zeros(BLOCK, f_old.dtype)
    uz = np.zeros(BLOCK, f_old.dtype)
    for q in range(19):
        row = np.uint64(q * n_fluid) + low
        for k in range(n):
            tile[q * BLOCK + k] = f_old[table[row + np.uint64(k)]]
    for q in range(19):
        cx, cy, cz = velocity_Q3[q, 0], velocity_Q3[q, 1], velocity_Q3[q, 2]
        for k in range(BLOCK):
            value = tile[q * BLOCK + k]
            rho[k] += value
            ux[k] += cx * value
            uy[k] += cy * value
            uz[k] += cz * value
    for k in range(BLOCK):
        ux[k] += half * gx
        uy[k] += half * gy
        uz[k] += half * gz
    if freeze:
        for k in range(n):
            ux[k] = frozen_3N[0, low + np.uint64(k)]
            uy[k] = frozen_3N[1, low + np.uint64(k)]
            uz[k] = frozen_3N[2, low + np.uint64(k)]
    even_force = real(1.0) - half * omega_even
    odd_force = real(1.0) - half * omega_odd
    for k in range(BLOCK):
        square = ux[k] * ux[k] + uy[k] * uy[k] + uz[k] * uz[k]
        power = ux[k] * gx + uy[k] * gy + uz[k] * gz
        # From here on rho is what all even parts share, times their weight.
        rho[k] = omega_even * (rho[k] - real(1.5) * square) - real(3.0) * even_force * power
    w = weight_Q[0]
    for k in range(BLOCK):
        tile[k] += w * rho[k] - omega_even * tile[k]
    for pair in range(9):
        a = 2 * pair + 1
        cx, cy, cz = velocity_Q3[a, 0], velocity_Q3[a, 1], velocity_Q3[a, 2]
        w = weight_Q[a]
        force = real(9.0) * even_force * (cx * gx + cy * gy + cz * gz)
        push = real(3.0) * odd_force * (cx * gx + cy * gy + cz * gz)
        for k in range(BLOCK):
            cu = cx * ux[k] + cy * uy[k] + cz * uz[k]
            plus = tile[a * BLOCK + k]
            minus = tile[(a + 1) * BLOCK + k]
            even = w * (rho[k] + (real(4.5) * omega_even * cu + force) * cu)
            even -= omega_even * half * (plus + minus)
            odd = w * (real(3.0) * omega_odd * cu + push) - omega_odd * half * (plus - minus)
            tile[a * BLOCK + k] = plus + even + odd
            tile[(a + 1) * BLOCK + k] = minus + even - odd
    for q in range(19):
        row = np.uint64(q * n_fluid) + low
        for k in range(n):
            f_new[row + np.uint64(k)] = tile[q * BLOCK + k]


@compiled()
def advance_serial(f_2F, table_QN, velocity_Q3, weight_Q, force_T3, frozen_3N, freeze, rates_2, start):  # type: ignore[no-untyped-def]
    """Advance ``len(force_T3)`` time steps between the two buffers f_2F [2, 19 * n_fluid], reading f_2F[start] first.

    Populations are stored after collision and shifted, f - w. The collision is TRT with the incompressible
    equilibrium of He and Luo (1997) and Guo's body force (2002), whose even and odd parts relax at their own
    rates_2 [even, odd].
    With ``freeze`` the velocity of the equilibrium is frozen_3N, so that only density and stress relax: the density
    converges to the pressure that belongs to the velocity (Mei et al., 2006).
    One thread; releases the GIL, so that several flows can run side by side.
    """
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for step in range(force_T3.shape[0]):
        f_old, f_new = f_2F[(start + step) % 2], f_2F[(start + step + 1) % 2]
        for block in range((n_fluid + BLOCK - 1) // BLOCK):
            _advance_block(
                block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_T3[step], frozen_3N, freeze, rates_2
            )


@compiled(parallel=True)
def advance_parallel(f_2F, table_QN, velocity_Q3, weight_Q, force_T3, frozen_3N, freeze, rates_2, start):  # type: ignore[no-untyped-def]
    """`advance_serial` on all threads of numba: the same bits, faster on large grids only."""
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for step in range(force_T3.shape[0]):
        f_old, f_new = f_2F[(start + step) % 2], f_2F[(start + step + 1) % 2]
        for block in numba.prange((n_fluid + BLOCK - 1) // BLOCK):
            _advance_block(
                block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_T3[step], frozen_3N, freeze, rates_2
            )
