"""Gather table: the source of each population of the D3Q19 lattice.

The velocity set is that of `kernels.lattice_boltzmann`. Its first seven directions are the D3Q7 set, so the first seven
rows of the table serve the scalar.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shodh_moe.kernels.lattice_boltzmann import INDEX, OPPOSITE_Q, SOUND_SPEED, VELOCITIES_Q3, WEIGHTS_Q, Q

__all__ = ["OPPOSITE_Q", "SOUND_SPEED", "VELOCITIES_Q3", "WEIGHTS_Q", "Q", "gather_table"]


def gather_table(solid_XYZ: NDArray[np.bool_], lid: bool) -> NDArray[np.uint32]:
    """Source of each population of each fluid cell: [19, n_fluid] flat indices into [19, n_fluid].

    Fluid cells are numbered in C order. A population whose upstream cell is solid comes from the opposite direction of
    the same cell (half-way bounce-back: the wall lies half a cell away). With ``lid`` the top z face reflects
    populations specularly (free slip) instead of letting them wrap around; everything else is periodic.

    Raises:
        ValueError: there are too many fluid cells for 32-bit indices.
    """
    nx, ny, nz = solid_XYZ.shape
    fluid_XYZ = ~solid_XYZ
    n_fluid = int(fluid_XYZ.sum())
    number_XYZ = np.full(solid_XYZ.shape, -1, dtype=np.int64)
    number_XYZ[fluid_XYZ] = np.arange(n_fluid)
    cell_N3 = np.argwhere(fluid_XYZ)
    here_N = np.arange(n_fluid)

    table_QN = np.empty((Q, n_fluid), dtype=np.int64)
    for q, (cx, cy, cz) in enumerate(VELOCITIES_Q3):
        source_N3 = (cell_N3 - (cx, cy, cz)) % (nx, ny, nz)
        from_N = np.full(n_fluid, q)
        if lid and cz == -1:
            # Mirror: the population left the top layer upwards, met the lid half a cell above, and came back.
            top_N = cell_N3[:, 2] == nz - 1
            source_N3[top_N, 2] = nz - 1
            from_N[top_N] = INDEX[int(cx), int(cy), 1]
        source_N = number_XYZ[tuple(source_N3.T)]
        blocked_N = source_N < 0
        source_N = np.where(blocked_N, here_N, source_N)
        from_N = np.where(blocked_N, OPPOSITE_Q[q], from_N)
        table_QN[q] = from_N * n_fluid + source_N
    if table_QN.size and table_QN.max() >= 2**32:
        raise ValueError(f"grid {solid_XYZ.shape} has too many fluid cells for a 32-bit gather table")
    return table_QN.astype(np.uint32)
