"""``shodh finetune``."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from shodh_moe.base.command import path_option, path_or_url
from shodh_moe.cli.common import MODEL, add_command, add_debug, add_launch_options, add_tokenizer_option, overrides_of
from shodh_moe.config.finetune import FineTuningConfig


def add_finetune(commands: Any) -> None:
    example = "example: shodh finetune --model quickstart_model --data my_flows --output my_model\n"
    example += "a new path beside the others: shodh finetune --model ... --train expert training.steps=400"
    text = "train a model further on your own domain, and export the result"
    parser = add_command(commands, "finetune", text, example, _finetune)
    parser.add_argument("--model", type=path_or_url, required=True, help=MODEL)
    parser.add_argument("--data", type=path_option, required=True, help="folder of a dataset in the_well's schema")
    parser.add_argument("--output", type=path_option, required=True, help="new folder for the exported model")
    kinds = get_args(FineTuningConfig.model_fields["train"].annotation)
    about = "what learns: all weights (default), a new path (expert), the paths of the data, low-rank additions "
    about += "(lora), or the router"
    parser.add_argument("--train", choices=kinds, help=about)
    parser.add_argument("--config", type=path_option, help="YAML file of settings that differ from the model's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as training.steps=400")
    add_launch_options(parser)
    add_tokenizer_option(parser)
    add_debug(parser)


def _finetune(options: argparse.Namespace) -> None:
    from shodh_moe.runs.finetune import Request, finetune

    overrides = overrides_of(options)
    if options.train:
        overrides.append(f"finetune.train={options.train}")
    names = ("model", "data", "output", "config", "tokenizer")
    finetune(Request(overrides=tuple(overrides), **{name: getattr(options, name) for name in names}))
