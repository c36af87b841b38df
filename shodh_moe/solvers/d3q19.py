"""The D3Q19 velocity set and the table that says where each population comes from.

Directions come in opposite pairs, (1, 2), (3, 4), ..., after the rest direction 0, because the two-relaxation-time
collision works on pairs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HALF = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (0, 1, 1), (0, 1, -1)]
VELOCITIES_Q3: NDArray[np.int64] = np.array(
    [(0, 0, 0)] + [sign * np.array(c) for c in _HALF for sign in (1, -1)], dtype=np.int64
)
WEIGHTS_Q: NDArray[np.float64] = np.array([1 / 3] + [1 / 18] * 6 + [1 / 36] * 12)
OPPOSITE_Q: NDArray[np.int64] = np.array([0] + [q + 1 if q % 2 else q - 1 for q in range(1, 19)])
Q = 19
SOUND_SPEED = 1 / np.sqrt(3.0)

_INDEX = {tuple(int(x) for x in c): q for q, c in enumerate(VELOCITIES_Q3)}


def gather_table(solid_XYZ: NDArray[np.bool_], lid: bool) -> NDArray[np.uint32]:
    """Where each population of each fluid cell is pulled from: [19, n_fluid] flat indices into [19, n_fluid].

    Fluid cells are numbered in C order. A population whose upstream cell is solid comes from the same cell,
    opposite direction (half-way bounce-back: the wall lies half a cell away). With ``lid`` the top z face reflects
    populations specularly (free slip) and nothing wraps around in z upwards; everything else is periodic.
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
            from_N[top_N] = _INDEX[int(cx), int(cy), 1]
        elif lid and cz == 1:
            bottom_N = cell_N3[:, 2] == 0
            if bottom_N.any():
                raise ValueError("a lid needs a solid bottom layer: solid_XYZ[:, :, 0] must be all True")
        source_N = number_XYZ[tuple(source_N3.T)]
        blocked_N = source_N < 0
        source_N = np.where(blocked_N, here_N, source_N)
        from_N = np.where(blocked_N, OPPOSITE_Q[q], from_N)
        table_QN[q] = from_N * n_fluid + source_N
    if table_QN.size and table_QN.max() >= 2**32:
        raise ValueError(f"grid {solid_XYZ.shape} has too many fluid cells for a 32-bit gather table")
    return table_QN.astype(np.uint32)
