"""The numba kernel of the lattice Boltzmann solver: gather, collision and force in one pass over the fluid cells.

Cells are processed in fixed blocks that fit the first-level cache, and no cell depends on another cell of the same time
step, so the result has the same bits for any number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from shodh_moe.kernels.compiled import compiled

BLOCK = 128
# Treatment of the velocity, see `advance_serial`.
FREE, HOLD, KEEP = 0, 1, 2


@compiled()
def _collide(tile, rho, ux, uy, uz, velocity_Q3, weight_Q, gx, gy, gz, omega_even, omega_odd):  # type: ignore[no-untyped-def]
    """Apply collision and force in place to a tile [19 * BLOCK] of populations, with the same rates for all cells."""
    real = tile.dtype.type
    half = real(0.5)
    even_force = real(1.0) - half * omega_even
    odd_force = real(1.0) - half * omega_odd
    for k in range(BLOCK):
        square = ux[k] * ux[k] + uy[k] * uy[k] + uz[k] * uz[k]
        power = ux[k] * gx + uy[k] * gy + uz[k] * gz
        # From here on rho is the common factor of all even parts, to be multiplied by their weight.
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


@compiled()
def _collide_with_eddies(tile, rho, ux, uy, uz, velocity_Q3, weight_Q, gx, gy, gz, rates):  # type: ignore[no-untyped-def]
    """`_collide` with an even rate for each cell that depends on its stress.

    See `kernels.lattice_boltzmann.relaxation_time`.
    """
    real = tile.dtype.type
    half, one = real(0.5), real(1.0)
    xx, yy, zz = np.zeros(BLOCK, tile.dtype), np.zeros(BLOCK, tile.dtype), np.zeros(BLOCK, tile.dtype)
    xy, xz, yz = np.zeros(BLOCK, tile.dtype), np.zeros(BLOCK, tile.dtype), np.zeros(BLOCK, tile.dtype)
    even_rate = np.empty(BLOCK, tile.dtype)
    for pair in range(9):
        a = 2 * pair + 1
        cx, cy, cz = velocity_Q3[a, 0], velocity_Q3[a, 1], velocity_Q3[a, 2]
        for k in range(BLOCK):
            both = tile[a * BLOCK + k] + tile[(a + 1) * BLOCK + k]
            xx[k] += cx * cx * both
            yy[k] += cy * cy * both
            zz[k] += cz * cz * both
            xy[k] += cx * cy * both
            xz[k] += cx * cz * both
            yz[k] += cy * cz * both
    omega_odd, time, scale = rates[1], rates[2], rates[3]
    square_time = (time + half) * (time + half)
    for k in range(BLOCK):
        third = rho[k] / real(3.0)
        # Remove equilibrium and force from the moments.
        pxx = xx[k] - third - ux[k] * ux[k] + ux[k] * gx
        pyy = yy[k] - third - uy[k] * uy[k] + uy[k] * gy
        pzz = zz[k] - third - uz[k] * uz[k] + uz[k] * gz
        pxy = xy[k] - ux[k] * uy[k] + half * (ux[k] * gy + uy[k] * gx)
        pxz = xz[k] - ux[k] * uz[k] + half * (ux[k] * gz + uz[k] * gx)
        pyz = yz[k] - uy[k] * uz[k] + half * (uy[k] * gz + uz[k] * gy)
        norm = np.sqrt(pxx * pxx + pyy * pyy + pzz * pzz + real(2.0) * (pxy * pxy + pxz * pxz + pyz * pyz))
        more = scale * norm
        # Solve the quadratic equation without a difference of nearly equal numbers, as small viscosities require.
        local = time + half * more / (np.sqrt(square_time + more) + time + half)
        even_rate[k] = one / (local + half)
    for k in range(BLOCK):
        square = ux[k] * ux[k] + uy[k] * uy[k] + uz[k] * uz[k]
        power = ux[k] * gx + uy[k] * gy + uz[k] * gz
        rho[k] = even_rate[k] * (rho[k] - real(1.5) * square) - real(3.0) * (one - half * even_rate[k]) * power
    w = weight_Q[0]
    for k in range(BLOCK):
        tile[k] += w * rho[k] - even_rate[k] * tile[k]
    for pair in range(9):
        a = 2 * pair + 1
        cx, cy, cz = velocity_Q3[a, 0], velocity_Q3[a, 1], velocity_Q3[a, 2]
        w = weight_Q[a]
        along = real(9.0) * (cx * gx + cy * gy + cz * gz)
        push = real(3.0) * (one - half * omega_odd) * (cx * gx + cy * gy + cz * gz)
        for k in range(BLOCK):
            cu = cx * ux[k] + cy * uy[k] + cz * uz[k]
            plus = tile[a * BLOCK + k]
            minus = tile[(a + 1) * BLOCK + k]
            force = (one - half * even_rate[k]) * along
            even = w * (rho[k] + (real(4.5) * even_rate[k] * cu + force) * cu)
            even -= even_rate[k] * half * (plus + minus)
            odd = w * (real(3.0) * omega_odd * cu + push) - omega_odd * half * (plus - minus)
            tile[a * BLOCK + k] = plus + even + odd
            tile[(a + 1) * BLOCK + k] = minus + even - odd


@compiled()
def _advance_block(block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_3, velocity_3N, mode, rates):  # type: ignore[no-untyped-def]
    """Advance the fluid cells of one block by one time step, from f_old into f_new, both [19 * n_fluid]."""
    real = f_old.dtype.type
    half = real(0.5)
    gx, gy, gz = force_3[0], force_3[1], force_3[2]
    low = np.uint64(block * BLOCK)
    n = min(BLOCK, n_fluid - block * BLOCK)
    # Everything that the cells of this block need fits the first-level cache.
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
    if mode == HOLD:
        for k in range(n):
            ux[k] = velocity_3N[0, low + np.uint64(k)]
            uy[k] = velocity_3N[1, low + np.uint64(k)]
            uz[k] = velocity_3N[2, low + np.uint64(k)]
    elif mode == KEEP:
        for k in range(n):
            velocity_3N[0, low + np.uint64(k)] = ux[k]
            velocity_3N[1, low + np.uint64(k)] = uy[k]
            velocity_3N[2, low + np.uint64(k)] = uz[k]
    if rates[3] > 0:
        _collide_with_eddies(tile, rho, ux, uy, uz, velocity_Q3, weight_Q, gx, gy, gz, rates)
    else:
        _collide(tile, rho, ux, uy, uz, velocity_Q3, weight_Q, gx, gy, gz, rates[0], rates[1])
    for q in range(19):
        row = np.uint64(q * n_fluid) + low
        for k in range(n):
            f_new[row + np.uint64(k)] = tile[q * BLOCK + k]


@compiled()
def advance_serial(f_2F, table_QN, velocity_Q3, weight_Q, force_T3, velocity_3N, mode, rates, start):  # type: ignore[no-untyped-def]
    """Advance ``len(force_T3)`` time steps between the two buffers f_2F [2, 19 * n_fluid], reading f_2F[start] first.

    Populations are stored after collision and shifted, f - w. The collision is TRT with the incompressible equilibrium
    of He and Luo (1997) and Guo's body force (2002). ``rates`` [4] holds the even rate, the odd rate, and two numbers
    for the eddy viscosity: the even relaxation time minus 1/2 without it, and 18 sqrt(2) C^2 (0 for no eddy viscosity).

    With ``mode`` HOLD, velocity_3N is the velocity of the equilibrium, so that only density and stress relax: the
    density converges to the pressure that belongs to the velocity (Mei et al., 2006). With KEEP, the flow's velocity is
    written to velocity_3N; with FREE, velocity_3N is not used.

    Uses one thread and releases the GIL, so that several flows can run side by side.
    """
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for step in range(force_T3.shape[0]):
        f_old, f_new = f_2F[(start + step) % 2], f_2F[(start + step + 1) % 2]
        for block in range((n_fluid + BLOCK - 1) // BLOCK):
            _advance_block(
                block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_T3[step], velocity_3N, mode, rates
            )


@compiled(parallel=True)
def advance_parallel(f_2F, table_QN, velocity_Q3, weight_Q, force_T3, velocity_3N, mode, rates, start):  # type: ignore[no-untyped-def]
    """`advance_serial` on all threads of numba: the same bits, but faster only on large grids."""
    n_fluid = table_QN.shape[1]
    table = table_QN.reshape(-1)
    for step in range(force_T3.shape[0]):
        f_old, f_new = f_2F[(start + step) % 2], f_2F[(start + step + 1) % 2]
        for block in numba.prange((n_fluid + BLOCK - 1) // BLOCK):
            _advance_block(
                block, n_fluid, f_old, f_new, table, velocity_Q3, weight_Q, force_T3[step], velocity_3N, mode, rates
            )
