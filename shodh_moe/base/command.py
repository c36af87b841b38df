"""Command-line parsers, and how every command ends: its exit code, and one line for the user or a traceback."""

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

from shodh_moe.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_UNREAD, EXIT_USER_ERROR, ReportedByRank0, UserError
from shodh_moe.base.files import disk_trouble
from shodh_moe.base.output import ReaderGone, guarded_output
from shodh_moe.base.paths import expand
from shodh_moe.base.remote import is_url
from shodh_moe.base.text import printable

EXIT_INTERRUPTED = 130
PATIENCE_S = 10.0  # how long a rank waits to be stopped before it reports an error that another rank reports too


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports wrong arguments like any other wrong input: one line, exit code 2.

    Attributes:
        commands: names of the commands; empty if there is no default command.
        default_command: command to run if the first argument is neither an option nor one of ``commands``.
    """

    commands: Container[str] = ()
    default_command = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.default_command and args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [self.default_command, *args]
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        with guarded_output():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}: see `{self.prog} --help`\n")


def path_text(text: str) -> str:
    """Expand a path of the command line (see `expand`); for ``type=`` of ``add_argument``."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_option(text: str) -> Path:
    """Like `path_text`, as a `Path`; a URL is refused."""
    expanded = path_or_url(text)
    if isinstance(expanded, str):
        raise argparse.ArgumentTypeError(f"{text} is a URL, and only a local path is possible here")
    return expanded


def path_or_url(text: str) -> Path | str:
    """Like `path_option`; a URL stays a text, because a path would lose one of its slashes."""
    expanded = path_text(text)
    return expanded if is_url(expanded) else Path(expanded)


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the arguments that all commands with a config share; ``required``: whether there must be a config."""
    parser.add_argument("--config", type=path_text, required=required, help="config file, e.g. configs/quickstart.yaml")
    parser.add_argument("--name", help="run name; default: the config's")
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shodh merge`."""
    parser.add_argument(
        "config", type=path_option, metavar="CONFIG", help="merge config, e.g. configs/merge/example.yaml"
    )
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that merges."""
    parser.add_argument("--output", type=path_option, help="folder to write; default: the config's")
    parser.add_argument(
        "--memory-limit", default="1GiB", metavar="SIZE", help="limit for the whole process; default: %(default)s"
    )
    parser.add_argument(
        "--out-shard-size", default="5GB", metavar="SIZE", help="largest file of an output; default: %(default)s"
    )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shodh merge sweep`, which launch/ccm_merge.py has too."""
    parser.add_argument("config", type=path_option, nargs="+", metavar="CONFIG", help="merge configs")
    about = "alphas of ccm, as -1,0,1 or FROM:TO:COUNT, in place of those in the configs; write --alpha=-1.5:1.5:7"
    parser.add_argument("--alpha", metavar="LIST", help=about)
    parser.add_argument("--part", type=int, default=0, metavar="I", help="part to make, from 0; default: %(default)s")
    parser.add_argument("--of", type=int, default=1, metavar="N", help="number of parts; default: %(default)s")
    add_output_arguments(parser)


def exit_code(work: Callable[[], object], debug: bool = False, goes_on: bool = False) -> int:
    """Run ``work`` and return an exit code.

    It is 0 if the work is done, 2 for wrong input, 130 after Ctrl-C, 141 if the reader of the output has ended (unless
    the work ``goes_on`` without), and 1 for any other exception.
    """
    try:
        with guarded_output(goes_on):
            return _run(work, debug)
    except ReaderGone:
        return EXIT_UNREAD


def _run(work: Callable[[], object], debug: bool) -> int:
    try:
        work()
        sys.stdout.flush()  # here, where an error can be reported
    except ReportedByRank0 as error:
        _wait_for_launcher()
        return _wrong_input(str(error), debug)
    except UserError as error:
        return _wrong_input(str(error), debug)
    except KeyboardInterrupt:
        message = "interrupted: no partial files are left; run the same command to resume or start over"
        print(message, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        if reason := disk_trouble(error):
            return _wrong_input(f"cannot use {error.filename or 'a file'}: {reason}", debug)
        traceback.print_exc()
        return EXIT_FAILED
    except Exception as error:
        if _lost_a_peer(error):
            _wait_for_launcher()
            print(
                "this rank stopped because another rank ended first: see that rank's message",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


def end_rank(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process at once with the exit code that it returns or raises.

    A rank may end while its process group's threads are alive. They have been seen to abort the process during the
    interpreter's shutdown, and the launcher then reports the abort instead of the rank's exit code.
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
    """Whether a collective operation failed because the peer process has ended."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(f"Connection {end} by peer" in text for end in ("closed", "reset"))


def _wait_for_launcher() -> None:
    """Wait to be stopped by the launcher: the rank that ended first reports why, and its exit code counts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE_S)


def _wrong_input(message: str, debug: bool) -> int:
    """Print ``message`` as one line on stderr, after a traceback if ``debug``; return the exit code."""
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    where = f" on rank {rank}" if rank.isdecimal() and rank.strip("0") else ""
    # Messages may contain line breaks of libraries, and names from files of others.
    print(f"error{where}: {printable(message)}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
