"""The parser and the exit codes of the ``shodh`` command."""

from __future__ import annotations

import argparse
import sys

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from shodh_moe.cli.audit import add_audit
from shodh_moe.cli.bench import add_bench
from shodh_moe.cli.checkpoint import add_checkpoint
from shodh_moe.cli.common import EXAMPLE
from shodh_moe.cli.data import add_data
from shodh_moe.cli.doctor import add_doctor
from shodh_moe.cli.expert import add_expert
from shodh_moe.cli.finetune import add_finetune
from shodh_moe.cli.init import add_init
from shodh_moe.cli.merge import add_merge
from shodh_moe.cli.plan import add_plan
from shodh_moe.cli.predict import add_predict
from shodh_moe.cli.runs import add_evaluate, add_pretrain, add_report, add_run, add_track
from shodh_moe.cli.serve import add_serve
from shodh_moe.cli.tokenizer import add_tokenizer
from shodh_moe.cli.watch import add_watch

# In the order of the help page.
COMMANDS = (
    *(add_init, add_run, add_data, add_tokenizer, add_pretrain, add_evaluate, add_report, add_watch, add_track),
    *(add_plan, add_predict, add_serve, add_finetune, add_checkpoint, add_expert, add_merge, add_bench, add_audit),
    add_doctor,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse expects all positional arguments in one place, but overrides may be anywhere.
    overrides = getattr(options, "overrides", None)
    unknown = [argument for argument in rest if argument.startswith("-") or "=" not in argument or overrides is None]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    if overrides is not None:
        overrides += rest
    codes: list[int] = []

    def work() -> None:
        if options.needs_torch:
            codes.append(_with_torch(options))
        else:
            codes.append(options.work(options))

    return exit_code(work, options.debug) or codes[0]


def _with_torch(options: argparse.Namespace) -> int:
    from shodh_moe.base.memory import keep_freed_memory
    from shodh_moe.launching.launcher import TrainingFailed

    keep_freed_memory()
    try:
        return options.work(options) or EXIT_DONE
    except TrainingFailed as error:
        if error.exit_code not in (EXIT_USER_ERROR, EXIT_REQUEUE):
            print(f"error: {error}; the ranks' output above says why", file=sys.stderr, flush=True)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="shodh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Multi-physics foundation models: divergence-free tokenizer, mixture-of-experts pretraining.",
        epilog=f"{EXAMPLE.format(command='run')}\n\n"
        "exit codes: 0 done, 2 the input is wrong, 75 stopped by SIGTERM, SIGUSR1 or SIGHUP with a checkpoint,\n"
        "130 interrupted, 141 the reader of the output has ended, 1 everything else",
    )
    parser.set_defaults(needs_torch=True)
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    return parser
