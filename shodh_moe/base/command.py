"""How every command ends: the exit code, and one line for the user or a traceback for us."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from shodh_moe.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError
from shodh_moe.base.files import disk_trouble

EXIT_INTERRUPTED = 130


class OneLineParser(argparse.ArgumentParser):
    """Reports wrong arguments as every other wrong input: one line, exit code 2.

    Attributes:
        commands: names of its commands, where one of them is the default.
        default_command: what is meant where the first argument is no option and none of ``commands``.
    """

    commands: Container[str] = ()
    default_command = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.default_command and args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [self.default_command, *args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}: see `{self.prog} --help`\n")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of everything that reads a config."""
    parser.add_argument("--config", required=True, help="config file, e.g. configs/quickstart.yaml")
    parser.add_argument("--name", help="run name; default: the config's")
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `shodh merge` and of launch/ccm_merge.py."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="what to merge: configs/merge/example.yaml")
    parser.add_argument("--output", type=Path, help="the new folder, in place of the config's")
    parser.add_argument(
        "--memory-limit", default="1GiB", metavar="SIZE", help="of the whole process; default: %(default)s"
    )
    parser.add_argument(
        "--out-shard-size", default="5GB", metavar="SIZE", help="largest file of an output; default: %(default)s"
    )


def exit_code(work: Callable[[], object], debug: bool = False) -> int:
    """Run ``work`` and translate what it raises: 0 done, 2 wrong input, 130 Ctrl-C, 1 everything else."""
    try:
        work()
    except UserError as error:
        return _wrong_input(str(error), debug)
    except KeyboardInterrupt:
        told = "interrupted: nothing half-written is left, the same command goes on or starts anew"
        print(told, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        if reason := disk_trouble(error):
            return _wrong_input(f"cannot use {error.filename or 'a file'}: {reason}", debug)
        traceback.print_exc()
        return EXIT_FAILED
    except Exception as error:
        if _lost_a_peer(error):
            # The rank that ended first has said why and its exit code counts: let the launcher stop this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
            print("a rank stopped because another ended first: see that one's message", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


def end_rank(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process with the exit code that it returns, or raises, there and then.

    A rank may end while its process group and the group's threads live: at the interpreter's own end these have been
    seen to abort the process, and the launcher then reports the abort instead of the rank's exit code.
    """
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else EXIT_FAILED
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because the process at the other end is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(f"Connection {end} by peer" in text for end in ("closed", "reset"))


def _wrong_input(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = int(os.environ.get("RANK", 0))
    # What a library says inside a message may have line breaks.
    print(f"error{f' on rank {rank}' if rank else ''}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
