"""Read a new file back and compare it with the simulation, before the file gets its final name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import open_trajectories, read_provenance, read_snapshots
from shodh_moe.data.storage import CONCENTRATION
from shodh_moe.solvers import Simulation

_BLOCK_BYTES = 2**26  # bytes read at a time
AGAIN = "run the same command again; if the error recurs, check the disk and the memory"


def require_as_written(file: Path, simulation: Simulation, name: Path) -> None:
    """Read ``file`` with the project's own reader, a few snapshots at a time, and compare all values.

    The data may come from the page cache: this detects wrong or missing writes, but not later failures of the disk.

    Args:
        name: final path of the file, for messages.

    Raises:
        UserError: the file cannot be read, does not follow the schema or has other values, or a value is not finite.
    """
    try:
        records = open_trajectories(file, simulation.solid_XYZ.shape)
        if len(records) != 1 or records[0].n_snapshots != len(simulation.time_T):
            raise UserError("it does not contain exactly one trajectory with all snapshots")
        if not read_provenance(file).get("complete"):
            raise UserError("it is not marked as complete")
        at_a_time = max(1, _BLOCK_BYTES * records[0].n_snapshots // records[0].nbytes)
        for first in range(0, records[0].n_snapshots, at_a_time):
            block = slice(first, min(first + at_a_time, records[0].n_snapshots))
            fields_T4XYZ, solid_1XYZ = read_snapshots(records[0], block.start, block.stop)
            _require_same("velocity", fields_T4XYZ[:, :3], simulation.velocity_T3XYZ[block], first)
            _require_same("pressure", fields_T4XYZ[:, 3], simulation.pressure_TXYZ[block], first)
            _require_same("solid", solid_1XYZ, simulation.solid_XYZ[None])
        if simulation.scalar_TXYZ is not None:
            with opened(file) as stored:
                for t in range(records[0].n_snapshots):
                    stored_XYZ = stored[f"t0_fields/{CONCENTRATION}"][0, t]
                    _require_same(CONCENTRATION, stored_XYZ[None], simulation.scalar_TXYZ[t : t + 1], t)
    except (UserError, OSError, KeyError) as error:
        raise UserError(f"{name} is not correct when read back ({error}): {AGAIN}") from error


def _require_same(
    field: str, stored_T: NDArray[np.generic], wanted_T: NDArray[np.generic], first: int | None = None
) -> None:
    """Compare stored and simulated values along the first axis; raise `UserError` at the first difference.

    Args:
        first: number of the first snapshot, for messages; None for a field without time.
    """
    for n, (stored, wanted) in enumerate(zip(stored_T, wanted_T, strict=True)):
        what = field if first is None else f"{field} of snapshot {first + n}"
        if not np.isfinite(stored).all():
            raise UserError(f"{what} has values that are not finite")
        if not np.array_equal(stored, wanted.astype(np.float32, copy=False)):
            raise UserError(f"{what} has other values than were written")
