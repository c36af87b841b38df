"""The ``shodh`` command: the whole main job, or one of its stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from shodh_moe.command import OneLineParser, add_config_arguments, exit_code
from shodh_moe.config import Config
from shodh_moe.config_io import load_config
from shodh_moe.errors import EXIT_USER_ERROR

EXAMPLE = "example: shodh {command} --config configs/quickstart.yaml --name trial training.steps=200"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes the positional arguments only where they stand together.
    if unknown := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unknown argument {unknown[0]}")
    options.overrides += rest
    failed: list[int] = []

    def work() -> None:
        from shodh_moe.memory import keep_freed_memory
        from shodh_moe.pipeline import PretrainFailed

        keep_freed_memory()

        try:
            options.stage(load_config(options.config, options.overrides, options.name))
        except PretrainFailed as error:
            failed.append(error.exit_code)
            if error.exit_code != EXIT_USER_ERROR:
                print(f"error: {error}; the ranks' output above says why", file=sys.stderr, flush=True)

    code = exit_code(work, options.debug)
    return failed[0] if failed else code


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="shodh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Multi-physics foundation models: divergence-free tokenizer, mixture-of-experts pretraining.",
        epilog=f"{EXAMPLE.format(command='run')}\n\n"
        "exit codes: 0 done, 2 the input is wrong, 130 interrupted, 1 everything else",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _command(commands, "run", "the main job: every stage that is not up to date, then the report", _run)
    _command(commands, "data", "generate the dataset", _stage("make_data"))
    tokenizer = commands.add_parser(
        "tokenizer",
        help="train the tokenizer or encode a dataset with it",
        epilog=EXAMPLE.format(command="tokenizer train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = tokenizer.add_subparsers(required=True, metavar="step")
    _command(steps, "train", "train the tokenizer", _stage("make_tokenizer"), "tokenizer train")
    _command(steps, "encode", "cache the latents of the dataset", _stage("make_latents"), "tokenizer encode")
    _command(commands, "pretrain", "pretrain the latent transformer under the DeepSpeed launcher", _stage("pretrain"))
    _command(commands, "evaluate", "measure the newest checkpoint on held-out trajectories", _stage("evaluate"))
    _command(commands, "report", "write the report of a run", _stage("report"))
    return parser


def _command(commands: Any, name: str, text: str, stage: Callable[[Config], object], full_name: str = "") -> None:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EXAMPLE.format(command=full_name or name),
        # As it is: an example broken over two lines could not be copied.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.set_defaults(stage=stage)


def _stage(name: str) -> Callable[[Config], object]:
    def work(config: Config) -> None:
        from shodh_moe import pipeline

        pipeline.check(config)
        getattr(pipeline, name)(config)

    return work


def _run(config: Config) -> None:
    from shodh_moe import pipeline
    from shodh_moe.evaluation.report import summary_table

    metrics = pipeline.run_all(config)
    print(summary_table(metrics))
    print(f"report: {pipeline.paths_of(config).run / 'report' / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
