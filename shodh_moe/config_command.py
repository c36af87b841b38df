"""Commands that work on a config: their arguments, the config, and those that are a stage of the main job."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from shodh_moe.command import add_config_arguments, plain_command
from shodh_moe.config import Config
from shodh_moe.config_io import load_config

EXAMPLE = "example: shodh {command} --config configs/quickstart.yaml --name trial training.steps=200"


def config_command(
    commands: Any, name: str, text: str, work: Callable[[argparse.Namespace], object], full_name: str = ""
) -> argparse.ArgumentParser:
    """A command that reads a config; ``commands`` is what argparse's `add_subparsers` gives."""
    parser = plain_command(commands, name, text, EXAMPLE.format(command=full_name or name), work)
    add_config_arguments(parser)
    return parser


def config_of(options: argparse.Namespace) -> Config:
    """The config that a command line means."""
    return load_config(options.config, overrides_of(options), options.name)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The settings of a command line, its hostfile among them."""
    hostfile = [f"parallel.hostfile={options.hostfile}"] if getattr(options, "hostfile", None) else []
    overrides: list[str] = options.overrides
    return overrides + hostfile


def stage(name: str) -> Callable[[argparse.Namespace], None]:
    """What a command does that is one stage of `shodh_moe.pipeline`."""

    def work(options: argparse.Namespace) -> None:
        from shodh_moe import pipeline

        config = config_of(options)
        pipeline.check(config)
        getattr(pipeline, name)(config)

    return work
