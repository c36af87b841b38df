"""The commands ``shodh tokenizer train|encode|evaluate|decode|plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shodh_moe.config_command import config_command, config_of, stage
from shodh_moe.errors import UserError

SPLITS = ("train", "valid", "test")


def add_tokenizer_commands(steps: Any) -> None:
    """Add the five steps; ``steps`` is what argparse's `add_subparsers` gives."""
    train = config_command(steps, "train", "train the tokenizer", stage("make_tokenizer"), "tokenizer train")
    train.add_argument("--hostfile", help="train on these hosts: lines such as `worker-0 slots=8`")
    config_command(steps, "encode", "cache the latents of the dataset", stage("make_latents"), "tokenizer encode")
    text = "measure reconstructions of a split, by default the test split"
    evaluate = config_command(steps, "evaluate", text, _evaluate, "tokenizer evaluate")
    evaluate.add_argument("--split", choices=SPLITS, default="test")
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="JSON; default: evaluation.json of the tokenizer")
    text = "write the flows that cached latents stand for, in the layout of a dataset"
    decode = config_command(steps, "decode", text, _decode, "tokenizer decode")
    decode.add_argument("--split", choices=SPLITS, default="test")
    decode.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    decode.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the fields")
    text = "show parameters and memory of the tokenizer's training; starts nothing"
    plan = config_command(steps, "plan", text, _plan, "tokenizer plan")
    plan.add_argument("--world", type=int, help="ranks; default: those of this host")


def _evaluate(options: argparse.Namespace) -> None:
    from shodh_moe.evaluation.reconstruction import evaluate_tokenizer

    evaluate_tokenizer(config_of(options), options.split, options.output)


def _decode(options: argparse.Namespace) -> None:
    from shodh_moe.evaluation.decoding import decode_latents

    decode_latents(config_of(options), options.split, options.output, options.dtype)


def _plan(options: argparse.Namespace) -> None:
    from shodh_moe.checks import processes
    from shodh_moe.training.tokenizer_plan import tokenizer_plan

    config = config_of(options)
    if options.world is not None and options.world < 1:
        raise UserError(f"--world {options.world}: give the number of ranks, at least 1")
    print(tokenizer_plan(config, options.world or processes(config)))
