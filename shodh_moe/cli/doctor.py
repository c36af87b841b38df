"""``shodh doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option, path_text
from shodh_moe.cli.common import add_command, add_debug


def add_doctor(commands: Any) -> None:
    text = "check whether training can run here or on the hosts of a hostfile, and suggest fixes"
    example = "example: shodh doctor --hostfile hostfile --shared runs"
    parser = add_command(commands, "doctor", text, example, _doctor)
    parser.set_defaults(needs_torch=False)  # it must run if torch cannot be imported
    parser.add_argument(
        "--hostfile", type=path_option, help="file with hosts to check too, one per line, as in `worker-0 slots=8`"
    )
    parser.add_argument(
        "--shared",
        action="append",
        type=path_text,
        metavar="FOLDER",
        help="folder of runs, data or tokenizers that all hosts share; may be repeated; default: the working folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)


def _doctor(options: argparse.Namespace) -> int:
    from shodh_moe.doctor import doctor

    return doctor(options.hostfile, options.shared, options.json)
