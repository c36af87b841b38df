"""The processes that ``mpirun`` or ``srun`` started: their number, this process's rank, and their communicator."""

from __future__ import annotations

import os
import time
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.variables import number_in

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_STOP_S = 60.0  # time for the first process to report an error and end the job, while the others wait


def in_slurm_step() -> bool:
    """Whether ``srun`` started this process. A batch script is not a job step."""
    return "SLURM_STEP_ID" in os.environ


def under_mpirun() -> bool:
    """Whether ``mpirun`` started this process. ``srun`` also sets MPI variables, which mpi4py may not support."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or ("PMI_SIZE" in os.environ and not in_slurm_step())


def mpi_size() -> int:
    """Return the number of processes that ``mpirun`` started; 1 without it."""
    return (number_in(*_SIZES, least=1) or 1) if under_mpirun() else 1


def mpi_rank() -> int:
    """Return this process's rank among them; 0 without ``mpirun``."""
    return (number_in(*_RANKS) or 0) if under_mpirun() else 0


def mpi_world() -> Any:
    """Return mpi4py's communicator of all processes.

    Raises:
        UserError: on the first process, if mpi4py is missing or belongs to another MPI. The other processes wait until
            they are ended.
    """
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == mpi_size():
            return MPI.COMM_WORLD
        reason = f"it counts {MPI.COMM_WORLD.size}: it was built for a different MPI than this mpirun's"
    except (ImportError, RuntimeError) as error:
        reason = str(error)
    if mpi_rank():
        time.sleep(_STOP_S)
    raise UserError(
        f"mpirun started {mpi_size()} processes, but mpi4py cannot be used ({reason}): pip install 'shodh_moe[mpi]'"
    )
