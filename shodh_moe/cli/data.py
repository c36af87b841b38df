"""``shodh data generate|import|check|info|preview``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import EXIT_DONE, EXIT_USER_ERROR
from shodh_moe.cli.common import EXAMPLE, add_command, add_config_command, add_debug, add_group, stage

DATASET = "a dataset's folder, or one HDF5 file"


def add_data(commands: Any) -> None:
    text = "generate a dataset, import your own, check it or look at it"
    steps = add_group(commands, "data", text, EXAMPLE.format(command="data generate"))
    add_config_command(steps, "generate", "generate the dataset", stage("make_data"), "data generate")
    example = "example: shodh data import configs/import/jhtdb_channel.yaml"
    text = "bring your own HDF5, NetCDF or npz arrays into our layout (docs/import.md)"
    step = add_command(steps, "import", text, example, _import)
    step.add_argument("mapping", type=Path, metavar="MAPPING", help="YAML file that says where everything is")
    step.add_argument("--output", type=Path, metavar="FOLDER", help="of the dataset, in place of the mapping's")
    step.add_argument("--skip-bad", action="store_true", help="go on without what cannot be read, and list it")
    add_debug(step)
    example = "example: shodh data check data/quickstart"
    text = "read everything and list all that is wrong; exit code 2 where training would fail or be misled"
    step = add_command(steps, "check", text, example, _check)
    step.add_argument("path", type=Path, metavar="PATH", help=DATASET)
    step.add_argument("--skip-bad", action="store_true", help="files that cannot be read are listed, but no error")
    step.add_argument("--json", action="store_true", help="the same as JSON")
    add_debug(step)
    example = "example: shodh data info data/quickstart"
    step = add_command(steps, "info", "show what a dataset or a file holds", example, _info)
    step.add_argument("path", type=Path, metavar="PATH", help=DATASET)
    step.add_argument("--json", action="store_true", help="the same as JSON")
    add_debug(step)
    example = "example: shodh data preview data/quickstart --output pictures"
    step = add_command(steps, "preview", "write slices through the flow as PNG pictures", example, _preview)
    step.add_argument("path", type=Path, metavar="PATH", help=DATASET)
    step.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    add_debug(step)


def _import(options: argparse.Namespace) -> None:
    from shodh_moe.data.importing import import_data, load_mapping

    folder = import_data(load_mapping(options.mapping), options.output, skip_bad=options.skip_bad)
    print(f"[import] {folder}")


def _check(options: argparse.Namespace) -> int:
    from shodh_moe.data.check import check_files

    report = check_files(options.path, skip_bad=options.skip_bad)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.text())
    return EXIT_USER_ERROR if report.errors else EXIT_DONE


def _info(options: argparse.Namespace) -> None:
    from shodh_moe.data.info import describe, table

    found = describe(options.path)
    print(json.dumps(found, indent=2) if options.json else table(found))


def _preview(options: argparse.Namespace) -> None:
    from shodh_moe.data.preview import preview

    for path in preview(options.path, options.output):
        print(f"[preview] {path}")
