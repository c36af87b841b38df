"""``shodh checkpoint inspect|verify|export|push``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from shodh_moe.base.command import path_option, path_or_url
from shodh_moe.base.errors import EXIT_DONE, EXIT_USER_ERROR
from shodh_moe.base.text import printable
from shodh_moe.cli.common import add_command, add_debug, add_group, add_tokenizer_option


def add_checkpoint(commands: Any) -> None:
    example = "example: shodh checkpoint export runs/trial --output trial_model"
    steps = add_group(commands, "checkpoint", "show, check or export a checkpoint", example)
    for name, text, work in (
        ("inspect", "show the contents of a checkpoint", _inspect),
        ("verify", "check every byte of a checkpoint, a run's checkpoints, or an exported folder", _verify),
        ("export", "export weights, tokenizer, config and model card to one folder", _export),
    ):
        end = " --output trial_model" if name == "export" else ""
        step = add_command(steps, name, text, f"example: shodh checkpoint {name} runs/trial{end}", work)
        step.add_argument("path", type=path_option, metavar="PATH", help="a checkpoint or a run folder")
        if name == "export":
            about = "new folder; also a URL, such as s3://bucket/trial_model"
            step.add_argument("--output", type=path_or_url, required=True, metavar="FOLDER", help=about)
            about = "add graphs that run without this package: torch.export programs, ONNX files"
            step.add_argument("--portable", nargs="+", choices=["pt2", "onnx"], default=[], help=about)
            about = (
                "licence of the weights for the model card, such as cc-by-4.0; default: apache-2.0 for simulated data"
            )
            step.add_argument("--licence", metavar="NAME", help=about)
            add_tokenizer_option(step)
        add_debug(step)
    example = "example: shodh checkpoint push trial_model owner/trial"
    push = add_command(steps, "push", "upload an exported folder to the model hub", example, _push)
    push.add_argument("path", type=path_option, metavar="FOLDER", help="an exported folder")
    push.add_argument("name", metavar="OWNER/NAME", help="repository on the hub; it is made if it does not exist")
    push.add_argument("--revision", metavar="BRANCH", help="branch to upload to; default: main")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    add_debug(push)


def _inspect(options: argparse.Namespace) -> None:
    from shodh_moe.checkpoint.inspect import inspect

    print(inspect(options.path))


def _verify(options: argparse.Namespace) -> int:
    from shodh_moe.checkpoint.inspect import verify
    from shodh_moe.inference.loading import verify_export

    exported = (options.path / "export.json").exists()
    damages = verify_export(options.path) if exported else verify(options.path)
    for damage in damages:
        print(f"error: {printable(damage)}", file=sys.stderr)
    if damages:
        return EXIT_USER_ERROR
    print(f"intact: {options.path}")
    return EXIT_DONE


def _export(options: argparse.Namespace) -> None:
    from shodh_moe.inference.export import export

    print(f"[export] {export(options.path, options.output, options.tokenizer, options.portable, options.licence)}")


def _push(options: argparse.Namespace) -> None:
    from shodh_moe.inference.push import push

    print(f"[push] {push(options.path, options.name, options.revision, options.private)}")
