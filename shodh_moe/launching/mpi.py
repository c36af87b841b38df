"""Processes that ``mpirun`` or ``srun`` started: how many there are, which one this is, and mpi4py's word for them."""

from __future__ import annotations

import os
import time
from typing import Any

from shodh_moe.base.errors import UserError

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_STOP_S = 60.0  # how long the other processes wait for the first to say what is wrong and end the job


def in_slurm_step() -> bool:
    """Whether ``srun`` started this process; a batch script is no step."""
    return "SLURM_STEP_ID" in os.environ


def under_mpirun() -> bool:
    """Whether ``mpirun`` started this process. ``srun`` sets variables of MPI too, which mpi4py need not know."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or ("PMI_SIZE" in os.environ and not in_slurm_step())


def mpi_size() -> int:
    """How many processes ``mpirun`` says it started; 1 without it."""
    return int(next((os.environ[name] for name in _SIZES if name in os.environ), "1")) if under_mpirun() else 1


def mpi_rank() -> int:
    """Which of them this is."""
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), "0")) if under_mpirun() else 0


def mpi_world() -> Any:
    """mpi4py's communicator of all processes.

    Raises:
        UserError: on the first process, if mpi4py is missing or belongs to another MPI; the others wait to be ended.
    """
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == mpi_size():
            return MPI.COMM_WORLD
        reason = f"it counts {MPI.COMM_WORLD.size}: it was built for another MPI than the one of this mpirun"
    except (ImportError, RuntimeError) as error:
        reason = str(error)
    if mpi_rank():
        time.sleep(_STOP_S)
    raise UserError(
        f"mpirun started {mpi_size()} processes, but mpi4py cannot be used ({reason}): pip install 'shodh_moe[mpi]'"
    )
