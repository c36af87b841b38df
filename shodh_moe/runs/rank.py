"""One rank's program: its arguments, device and threads, whatever is trained."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from shodh_moe.base.command import OneLineParser, add_config_arguments, exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.launching.rank_variables import forget_launcher, require_hostfile_of_launcher, set_rank_variables


def rank_main(description: str, work: Callable[[argparse.Namespace], None], arguments: list[str] | None = None) -> int:
    """Parse the command line, call ``work`` with the options, and return the exit code.

    ``work`` is called with RANK, WORLD_SIZE and the like set, and calls `prepare` before it trains.
    """
    parser = OneLineParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--resume", default="auto", help="auto (the run's newest intact checkpoint) or a checkpoint")
    parser.add_argument("--stop-file", type=Path, help="by which the launching process asks for an end")
    parser.add_argument("--local_rank", help="set by some launchers; the environment decides")
    options = parser.parse_args(arguments)

    def in_rank() -> None:
        set_rank_variables()
        work(options)

    return exit_code(in_rank, options.debug)


def script_main(command: Callable[[list[str]], int], train: Callable[[list[str]], int]) -> int:
    """What a script in launch/ does, however its process was started.

    Args:
        command: the `shodh` command with these arguments, which starts ranks on the hosts of a hostfile.
        train: one rank's program.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hostfile")
    parser.add_argument("--local_rank")
    options, rest = parser.parse_known_args()
    # DeepSpeed's launcher takes only what stands before the script: here it has started ranks on one host alone.
    if options.hostfile and int(os.environ.get("CROSS_SIZE", 1)) == 1:
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if "CROSS_SIZE" in os.environ:
            forget_launcher()
        return command(["--hostfile", options.hostfile, *rest]) if first else 0
    return exit_code(require_hostfile_of_launcher) or train(rest)


def prepare() -> None:
    """Choose threads and accelerator of this process, before anything of DeepSpeed is imported."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:  # every rank would take all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()


def is_first() -> bool:
    """Whether this is rank 0, which alone writes in the run folder before training begins."""
    return int(os.environ.get("RANK", 0)) == 0
