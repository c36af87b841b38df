"""``shodh init``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from shodh_moe.base.command import path_option
from shodh_moe.base.errors import EXIT_DONE, UserError
from shodh_moe.base.files import whole_folder, write_text
from shodh_moe.base.shipped import shipped_folder
from shodh_moe.cli.common import add_command, add_debug

IGNORED = "/data/\n/runs/\n/tokenizers/\n"  # what the commands make


def add_init(commands: Any) -> None:
    text = "write an example project: a config, four scripts that start with it, and a README"
    parser = add_command(commands, "init", text, "example: shodh init my_flows", _init)
    parser.set_defaults(needs_torch=False)
    parser.add_argument("folder", type=path_option, metavar="FOLDER", help="new folder")
    add_debug(parser)


def _init(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    if folder.exists():
        raise UserError(f"{folder} exists: give a new folder")
    with whole_folder(folder) as new:
        shutil.copytree(
            shipped_folder("examples"), new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copyfile(shipped_folder("configs") / "quickstart.yaml", new / "config.yaml")
        write_text(new / ".gitignore", IGNORED)
    print(f"[init] {folder}: read {folder / 'README.md'}, and start with `shodh run --config config.yaml` in it")
    return EXIT_DONE
