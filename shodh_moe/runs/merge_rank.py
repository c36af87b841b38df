"""`shodh merge sweep` and ``launch/ccm_merge.py``: processes and jobs share the targets of merge configs.

``mpirun`` and ``srun`` share them among their processes; ``--part I --of N`` makes one part of them, for job arrays.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from shodh_moe.base.command import OneLineParser, add_sweep_arguments, exit_code
from shodh_moe.base.errors import EXIT_USER_ERROR, UserError
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.variables import number
from shodh_moe.launching.mpi import in_slurm_step, mpi_world, under_mpirun
from shodh_moe.merging.config import Target
from shodh_moe.merging.merge import merge_targets, parse_size, plan_targets
from shodh_moe.merging.sweep import load_sweep, parse_alphas


def main(arguments: list[str] | None = None) -> int:
    """Run one process of the launch script and return its exit code."""
    parser = OneLineParser(
        prog="ccm_merge.py",
        description="Merge models. The processes divide the targets of the configs among themselves.",
        epilog="example: mpirun -n 4 python launch/ccm_merge.py configs/merge/example.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")
    keep_freed_memory()
    return share_sweep(parser.parse_args(arguments))


def share_sweep(options: argparse.Namespace) -> int:
    """Make this process's share of the targets and return its exit code; with MPI, the largest of all processes.

    Args:
        options: those of `add_sweep_arguments`, and ``debug``.
    """
    communicator: Any = None
    refused = False

    def work() -> None:
        nonlocal communicator, refused
        communicator, rank, size = process_place()
        if size > 1:
            os.environ["RANK"] = str(rank)  # for error messages
        # Every process would find the same mistakes in configs and inputs, so the first one looks for all.
        mistake = _mistake(options) if communicator is not None and rank == 0 else None
        mistake = communicator.bcast(mistake) if communicator is not None else None
        if mistake is None:
            _make(options, rank, size)
        elif rank == 0:
            raise UserError(mistake)
        else:
            refused = True

    # Among several, a process that ended early would leave the others waiting.
    code = exit_code(work, options.debug, goes_on=under_mpirun() or in_slurm_step())
    if communicator is None:
        return code
    # Wait until all processes have finished: mpirun kills the others as soon as one fails.
    codes: list[int] = communicator.allgather(EXIT_USER_ERROR if refused else code)
    return max(codes)


def _mistake(options: argparse.Namespace) -> str | None:
    """Return what is wrong with configs or inputs; None if nothing is."""
    try:
        plan_targets(_targets(options), parse_size(options.out_shard_size))
    except UserError as error:
        return str(error)
    return None


def _make(options: argparse.Namespace, rank: int, size: int) -> None:
    targets = _targets(options)
    rank, size = options.part * size + rank, options.of * size
    if size > 1:
        count = len(range(rank, len(targets), size))
        print(f"[sweep] share {rank + 1} of {size}: {count} of {len(targets)} targets", flush=True)
    merge_targets(targets, parse_size(options.memory_limit), parse_size(options.out_shard_size), rank, size)


def _targets(options: argparse.Namespace) -> list[Target]:
    if not 0 <= options.part < options.of:
        raise UserError(f"--part {options.part} --of {options.of}: N parts are numbered from 0 to N - 1")
    alphas = None if options.alpha is None else parse_alphas(options.alpha)
    return load_sweep(options.config, options.output, alphas)


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
