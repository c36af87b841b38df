"""The program that each rank runs for any kind of training: its arguments, device and threads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from shodh_moe.base.command import OneLineParser, add_config_arguments, exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.launching.rank_variables import require_launcher_hostfile, set_rank_variables, unset_rank_variables


def rank_main(description: str, work: Callable[[argparse.Namespace], None], arguments: list[str] | None = None) -> int:
    """Parse the command line, call ``work`` with the options, and return the exit code.

    RANK, WORLD_SIZE and the like are set before ``work``, which must call `prepare` before it trains.
    """
    parser = OneLineParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--resume", default="auto", help="auto (the run's newest intact checkpoint) or a checkpoint")
    parser.add_argument("--stop-file", type=Path, help="file in which the launching process asks the ranks to stop")
    parser.add_argument("--local_rank", help="set by some launchers; the environment decides")
    options = parser.parse_args(arguments)

    def in_rank() -> None:
        set_rank_variables()
        work(options)

    return exit_code(in_rank, options.debug)


def script_main(command: Callable[[list[str]], int], train: Callable[[list[str]], int]) -> int:
    """Run a script of launch/, however its process was started, and return the exit code.

    Args:
        command: runs the `shodh` command with the given arguments, which starts ranks on the hosts of a hostfile.
        train: program of one rank.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hostfile")
    parser.add_argument("--local_rank")
    options, rest = parser.parse_known_args()
    # DeepSpeed's launcher only reads options before the script. Here it has started ranks on one host only.
    if options.hostfile and int(os.environ.get("CROSS_SIZE", 1)) == 1:
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if "CROSS_SIZE" in os.environ:
            unset_rank_variables()
        return command(["--hostfile", options.hostfile, *rest]) if first else 0
    return exit_code(require_launcher_hostfile) or train(rest)


def prepare() -> None:
    """Choose the threads and accelerator of this process. Must run before DeepSpeed is imported."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:  # otherwise every rank would use all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()


def is_first() -> bool:
    """Whether this is rank 0, the only one that writes to the run folder before training starts."""
    return int(os.environ.get("RANK", 0)) == 0
