"""``shodh tokenizer train|encode|evaluate|decode|plan``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option
from shodh_moe.cli.common import EXAMPLE, add_config_command, add_group, add_launch_options, config_of, stage
from shodh_moe.cli.plan import add_world, world_of

SPLITS = ("train", "valid", "test")


def add_tokenizer(commands: Any) -> None:
    text = "train a tokenizer, encode a dataset, evaluate the tokenizer, or decode latents"
    steps = add_group(commands, "tokenizer", text, EXAMPLE.format(command="tokenizer train"))
    train = add_config_command(steps, "train", "train the tokenizer", stage("make_tokenizer"), "tokenizer train")
    add_launch_options(train)
    add_config_command(steps, "encode", "cache the latents of the dataset", stage("make_latents"), "tokenizer encode")
    text = "measure the reconstructions of a split, the test split by default"
    evaluate = add_config_command(steps, "evaluate", text, _evaluate, "tokenizer evaluate")
    evaluate.add_argument("--split", choices=SPLITS, default="test", help="split to measure; default: %(default)s")
    evaluate.add_argument(
        "--output",
        type=path_option,
        metavar="FILE",
        help="JSON file; default: evaluation.json in the tokenizer's folder",
    )
    text = "decode cached latents to flows in the layout of a dataset"
    decode = add_config_command(steps, "decode", text, _decode, "tokenizer decode")
    decode.add_argument("--split", choices=SPLITS, default="test", help="split to decode; default: %(default)s")
    decode.add_argument("--output", type=path_option, required=True, metavar="FOLDER", help="new folder")
    decode.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="precision of the fields; default: float32"
    )
    text = "show parameters and memory of the tokenizer's training; starts nothing"
    add_world(add_config_command(steps, "plan", text, _plan, "tokenizer plan"))


def _evaluate(options: argparse.Namespace) -> None:
    from shodh_moe.evaluation.reconstruction import evaluate_tokenizer

    evaluate_tokenizer(config_of(options), options.split, options.output)


def _decode(options: argparse.Namespace) -> None:
    from shodh_moe.inference.decoding import decode_latents

    decode_latents(config_of(options), options.split, options.output, options.dtype)


def _plan(options: argparse.Namespace) -> None:
    from shodh_moe.launching.hostfile import count_ranks
    from shodh_moe.runs.tokenizer_plan import tokenizer_plan

    config = config_of(options)
    print(tokenizer_plan(config, world_of(options) or count_ranks(config)))
