"""Helpers for all command groups: add a command or a group, add shared options, and read the config."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from shodh_moe.base.command import OneLineParser, add_config_arguments, path_option, path_text
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths

EXAMPLE = "example: shodh {command} --config configs/quickstart.yaml --name trial training.steps=200"
MODEL = (
    "a run folder (its newest intact checkpoint), a checkpoint, or an exported folder; also a URL, as hf://owner/name"
)
Work = Callable[[argparse.Namespace], object]


def add_group(commands: Any, name: str, text: str, example: str, default: str | None = None) -> Any:
    """Add ``shodh <name>``, a group of commands, and return the group.

    ``text`` is the help text. ``default`` is the command that runs if the first word after ``<name>`` is not a command
    of the group.
    """
    parser = commands.add_parser(name, help=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_subparsers(required=True, metavar="step", parser_class=OneLineParser)
    if default:
        parser.commands, parser.default_command = group.choices, default
    return group


def add_command(commands: Any, name: str, text: str, example: str, work: Work) -> argparse.ArgumentParser:
    """Add a command that calls ``work`` with the parsed options; ``text`` is its help text, without a full stop."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=example,
        # argparse would wrap a long example, which could then not be copied.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(work=work)
    return parser


def add_config_command(commands: Any, name: str, text: str, work: Work, full_name: str = "") -> argparse.ArgumentParser:
    """Add a command that reads a config. ``full_name`` is its name in the example, with that of its group."""
    parser = add_command(commands, name, text, EXAMPLE.format(command=full_name or name), work)
    add_config_arguments(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug`` to a command that reads no config."""
    parser.add_argument("--debug", action="store_true", help="show a traceback even if the input is wrong")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--hostfile`` and ``--elastic`` to a command that starts ranks."""
    parser.add_argument(
        "--hostfile", type=path_text, help="file with the hosts to train on, one per line, as in `worker-0 slots=8`"
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="start again after a failure, on the hosts that still answer",
    )


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tokenizer`` to a command that loads a trained model."""
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        help="folder of the model's tokenizer, if it is not where the model's config says",
    )


def config_of(options: argparse.Namespace) -> Config:
    """Read the config with the overrides of a command line."""
    return load_config(options.config, overrides_of(options), options.name)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The overrides of a command line, including the options of `add_launch_options`."""
    overrides: list[str] = list(options.overrides)
    if hostfile := getattr(options, "hostfile", None):
        overrides.append(f"parallel.hostfile={hostfile}")
    if getattr(options, "elastic", False):
        overrides.append("parallel.elastic=true")
    return overrides


def stage(name: str) -> Callable[[argparse.Namespace], None]:
    """Return the work of a command that checks the config and runs one stage of `shodh_moe.runs.pipeline`."""

    def work(options: argparse.Namespace) -> None:
        from shodh_moe.runs import pipeline

        config = config_of(options)
        paths = resolve_paths(config)
        pipeline.check(config, paths)
        getattr(pipeline, name)(config, paths)

    return work
