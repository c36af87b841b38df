"""What the groups of commands share: adding a command or a group of them, options, and reading the config."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shodh_moe.base.command import OneLineParser, add_config_arguments
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths

EXAMPLE = "example: shodh {command} --config configs/quickstart.yaml --name trial training.steps=200"
MODEL = "a run folder (its newest intact checkpoint), a checkpoint, or an exported folder"
Work = Callable[[argparse.Namespace], object]


def add_group(commands: Any, name: str, text: str, example: str, default: str | None = None) -> Any:
    """Add ``shodh <name>``, which has commands of its own; returns what they are added to.

    ``default`` is the command that is meant where the first word after ``<name>`` is none of them.
    """
    parser = commands.add_parser(name, help=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_subparsers(required=True, metavar="step", parser_class=OneLineParser)
    if default:
        parser.commands, parser.default_command = group.choices, default
    return group


def add_command(commands: Any, name: str, text: str, example: str, work: Work) -> argparse.ArgumentParser:
    """Add a command that calls ``work`` with its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=example,
        # An example that argparse wraps over two lines could not be copied.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(work=work)
    return parser


def add_config_command(commands: Any, name: str, text: str, work: Work, full_name: str = "") -> argparse.ArgumentParser:
    """Add a command that reads a config."""
    parser = add_command(commands, name, text, EXAMPLE.format(command=full_name or name), work)
    add_config_arguments(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that every command without a config has."""
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")


def add_hostfile(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that starts ranks."""
    parser.add_argument("--hostfile", help="train on these hosts: lines such as `worker-0 slots=8`")


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that loads a trained model."""
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer, if it is not where its config says")


def config_of(options: argparse.Namespace) -> Config:
    """The config that a command line means."""
    return load_config(options.config, overrides_of(options), options.name)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The settings of a command line, its hostfile among them."""
    hostfile = [f"parallel.hostfile={options.hostfile}"] if getattr(options, "hostfile", None) else []
    overrides: list[str] = options.overrides
    return overrides + hostfile


def stage(name: str) -> Callable[[argparse.Namespace], None]:
    """A command that is one stage of `shodh_moe.runs.pipeline`."""

    def work(options: argparse.Namespace) -> None:
        from shodh_moe.runs import pipeline

        config = config_of(options)
        paths = resolve_paths(config)
        pipeline.check(config, paths)
        getattr(pipeline, name)(config, paths)

    return work
