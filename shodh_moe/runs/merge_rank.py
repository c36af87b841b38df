"""The program of ``launch/ccm_merge.py``: several processes share the outputs of one merge config."""

from __future__ import annotations

import argparse
import os
from typing import Any

from shodh_moe.base.command import OneLineParser, add_merge_arguments, exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.variables import number
from shodh_moe.launching.mpi import in_slurm_step, mpi_world, under_mpirun
from shodh_moe.merging.merge import merge


def main(arguments: list[str] | None = None) -> int:
    """Run one process and return its exit code; with MPI, the largest exit code of all processes."""
    parser = OneLineParser(
        prog="ccm_merge.py",
        description="Merge models. The processes divide the outputs of a sweep among themselves.",
        epilog="example: mpirun -n 4 python launch/ccm_merge.py configs/merge/example.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_merge_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    communicator = None

    def work() -> None:
        nonlocal communicator
        communicator, rank, size = process_place()
        if size > 1:
            os.environ["RANK"] = str(rank)  # for error messages
        merge(options.config, options.output, options.memory_limit, options.out_shard_size, rank, size)

    # Among several, a process that ended early would leave the others waiting.
    code = exit_code(work, options.debug, goes_on=under_mpirun() or in_slurm_step())
    if communicator is None:
        return code
    # Wait until all processes have finished: mpirun kills the others as soon as one fails.
    codes: list[int] = communicator.allgather(code)
    return max(codes)


def process_place() -> tuple[Any, int, int]:
    """Return the MPI communicator (None without mpirun), the rank of this process, and the number of processes.

    Raises:
        UserError: mpirun started this process, but mpi4py is missing or belongs to another MPI.
    """
    if under_mpirun():
        world = mpi_world()
        return world, world.Get_rank(), world.Get_size()
    if in_slurm_step():
        return None, number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", least=1)
    return None, 0, 1
