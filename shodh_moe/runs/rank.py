"""The parts of a rank's program that all kinds of training share: command line, rank variables, device and threads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from shodh_moe.base.command import OneLineParser, add_config_arguments, exit_code, path_option, path_text
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.variables import number, number_in
from shodh_moe.config import RunConfig
from shodh_moe.launching.devices import accelerator, require_own_gpu
from shodh_moe.launching.rank_variables import (
    cores_of_rank,
    require_launcher_hostfile,
    set_rank_variables,
    unset_rank_variables,
    use_launcher_ssh_port,
)
from shodh_moe.launching.sentinel import attempt_of
from shodh_moe.launching.watchdog import Watchdog


def rank_main(description: str, work: Callable[[argparse.Namespace], None], arguments: list[str] | None = None) -> int:
    """Parse the command line, set the rank variables, call ``work`` with the options, and return the exit code.

    Args:
        description: text of ``--help``.
        work: trains; it must call `prepare` before it imports DeepSpeed.
        arguments: the command line; None for that of this process.
    """
    parser = OneLineParser(description=description)
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", type=path_text, default="auto", help="auto (the run's newest intact checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--stop-file", type=path_option, help="file in which the launching process asks the ranks to stop"
    )
    parser.add_argument("--local_rank", help="set by some launchers and ignored: LOCAL_RANK is used instead")
    options = parser.parse_args(arguments)

    def set_up_and_work() -> None:
        set_rank_variables()
        work(options)

    return exit_code(set_up_and_work, options.debug, goes_on=True)


def script_main(command: Callable[[list[str]], int], train: Callable[[list[str]], int]) -> int:
    """Run a script of ``launch/`` under any launcher or none, and return the exit code.

    With ``--hostfile`` the script starts ranks on the hosts of that file; otherwise this process is one rank.

    Args:
        command: runs the `shodh` command that starts the ranks, with the given arguments.
        train: runs one rank with the given arguments.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hostfile")
    parser.add_argument("--local_rank")
    options, rest = parser.parse_known_args()
    # DeepSpeed's launcher does not read options that follow the script's name. If it has started this process, it has
    # ignored --hostfile and used one host only: the first rank then starts the job again, and the others end.
    if options.hostfile and os.environ.get("CROSS_SIZE", "1") == "1":
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if "CROSS_SIZE" in os.environ:
            use_launcher_ssh_port()
            unset_rank_variables()
        return command(["--hostfile", options.hostfile, *rest]) if first else 0
    return exit_code(require_launcher_hostfile) or train(rest)


def start_watchdog(options: argparse.Namespace, config: RunConfig, run: Path) -> Watchdog | None:
    """Watch this rank from now on, if `launch_ranks` started it.

    Under other launchers this returns None: ranks must have met to agree on the name of an attempt. There
    ``parallel.elastic`` has no effect, and the first rank says so.

    Args:
        run: the run folder.
    """
    if options.stop_file is None:
        if config.parallel.elastic and is_first():
            print(
                "warning: parallel.elastic has no effect under this launcher: start with `shodh pretrain` or "
                "`launch/pretrain.py --hostfile`",
                flush=True,
            )
        return None
    attempt, seconds = attempt_of(options.stop_file), config.training.stall_seconds
    return Watchdog(run, number("RANK"), number("LOCAL_RANK"), attempt, seconds, options.stop_file)


def prepare() -> None:
    """Set this rank's number of threads, accelerator and memory allocator. Must run before DeepSpeed is imported.

    Raises:
        UserError: the accelerator cannot be used.
    """
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):  # otherwise every rank would use all cores
        torch.set_num_threads(cores_of_rank())
    kind = accelerator()
    require_own_gpu(kind)
    os.environ["DS_ACCELERATOR"] = kind
    keep_freed_memory()


def is_first() -> bool:
    """Whether this is rank 0, the only one that writes to the run folder before training starts."""
    return not number_in("RANK")
