"""``shodh data generate|import|check|info|preview``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from shodh_moe.base.command import path_option, path_or_url
from shodh_moe.base.errors import EXIT_DONE, EXIT_USER_ERROR
from shodh_moe.base.text import printable
from shodh_moe.cli.common import EXAMPLE, add_command, add_config_command, add_debug, add_group, stage

DATASET = "dataset folder or HDF5 file, or URL of a dataset folder"


def add_data(commands: Any) -> None:
    text = "generate, import, check or inspect a dataset"
    steps = add_group(commands, "data", text, EXAMPLE.format(command="data generate"))
    add_config_command(steps, "generate", "generate the dataset", stage("make_data"), "data generate")
    example = "example: shodh data import configs/import/jhtdb_channel.yaml"
    text = "convert your own HDF5, NetCDF or npz arrays to a dataset (docs/import.md)"
    step = add_command(steps, "import", text, example, _import)
    step.add_argument("mapping", type=path_option, metavar="MAPPING", help="YAML file that describes your arrays")
    step.add_argument("--output", type=path_option, metavar="FOLDER", help="dataset folder, instead of the mapping's")
    step.add_argument("--skip-bad", action="store_true", help="skip files that cannot be read, and list them")
    add_debug(step)
    example = "example: shodh data check data/quickstart"
    text = "read a whole dataset and list its errors; exit code 2 if training would fail or learn from wrong data"
    step = add_command(steps, "check", text, example, _check)
    step.add_argument("path", type=path_or_url, metavar="PATH", help=DATASET)
    step.add_argument(
        "--skip-bad", action="store_true", help="list files that cannot be read, but do not count them as errors"
    )
    step.add_argument("--json", action="store_true", help="print JSON")
    add_debug(step)
    example = "example: shodh data info data/quickstart"
    text = "show the contents of a dataset or a file; exit code 2 if a file cannot be read"
    step = add_command(steps, "info", text, example, _info)
    step.add_argument("path", type=path_or_url, metavar="PATH", help=DATASET)
    step.add_argument("--json", action="store_true", help="print JSON")
    add_debug(step)
    example = "example: shodh data preview data/quickstart --output pictures"
    step = add_command(steps, "preview", "write slices of the flow as PNG pictures", example, _preview)
    step.add_argument("path", type=path_or_url, metavar="PATH", help=DATASET)
    step.add_argument("--output", type=path_option, required=True, metavar="FOLDER", help="folder for the pictures")
    add_debug(step)


def _import(options: argparse.Namespace) -> None:
    from shodh_moe.data.importing import import_data, load_mapping

    folder = import_data(load_mapping(options.mapping), options.output, skip_bad=options.skip_bad)
    print(f"[import] {folder}")


def _check(options: argparse.Namespace) -> int:
    from shodh_moe.base.remote_file import local_folder
    from shodh_moe.data.check import check_files

    report = check_files(local_folder(options.path), skip_bad=options.skip_bad)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.text())
    return EXIT_USER_ERROR if report.errors else EXIT_DONE


def _info(options: argparse.Namespace) -> int:
    from shodh_moe.base.remote_file import local_folder
    from shodh_moe.data.info import describe, table

    found = describe(local_folder(options.path))
    print(json.dumps(found, indent=2) if options.json else table(found))
    return EXIT_USER_ERROR if found["unreadable"] else EXIT_DONE


def _preview(options: argparse.Namespace) -> None:
    from shodh_moe.base.remote_file import local_folder
    from shodh_moe.data.preview import preview

    for path in preview(local_folder(options.path), options.output):
        print(printable(f"[preview] {path}"))
