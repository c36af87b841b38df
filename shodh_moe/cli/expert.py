"""``shodh expert data|train``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import add_config_arguments, path_text
from shodh_moe.cli.common import add_command, add_group, add_launch_options, overrides_of
from shodh_moe.config.load import load_config_of


def add_expert(commands: Any) -> None:
    example = "example: shodh expert {step} --config configs/ccm/reaction_diffusion.yaml"
    text = "train neural operators on regimes of a 2D equation, for merging"
    steps = add_group(commands, "expert", text, example.format(step="train"))
    for name, text in (
        ("data", "generate the regimes of the config's family"),
        ("train", "train an anchor, or fine-tune an expert from one; generates missing data first"),
    ):
        step = add_command(steps, name, text, example.format(step=name), _expert)
        add_config_arguments(step)
        step.set_defaults(step=name)
        if name == "train":
            add_launch_options(step)
            step.add_argument(
                "--resume", type=path_text, default="auto", help="checkpoint to resume from; default: the newest one"
            )


def _expert(options: argparse.Namespace) -> None:
    from shodh_moe.ccm import stages
    from shodh_moe.ccm.config import ExpertConfig

    config = load_config_of(ExpertConfig, options.config, overrides_of(options), options.name)
    stages.check(config)
    stages.make_data(config)
    if options.step == "train":
        stages.train(config, options.resume)
