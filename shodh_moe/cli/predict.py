"""``shodh predict``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option, path_or_url
from shodh_moe.cli.common import MODEL, add_command, add_debug, add_tokenizer_option


def add_predict(commands: Any) -> None:
    example = "example: shodh predict --checkpoint runs/trial --input flow.hdf5 --steps 10 --output prediction.hdf5"
    parser = add_command(commands, "predict", "continue your own flow with a trained model", example, _predict)
    parser.add_argument("--checkpoint", type=path_or_url, required=True, help=MODEL)
    parser.add_argument("--input", type=path_option, required=True, help="HDF5 file in the_well's schema")
    parser.add_argument("--steps", type=int, required=True, help="snapshots to predict")
    parser.add_argument(
        "--output",
        type=path_option,
        required=True,
        help="new HDF5 file; a file for ParaView with suffix .vtkhdf is added",
    )
    parser.add_argument("--start", type=int, default=0, help="first input snapshot; default: %(default)s")
    about = "time steps of the input from one given or predicted snapshot to the next, one of the model's strides; "
    about += "default: the first of them"
    parser.add_argument("--stride", type=int, help=about)
    parser.add_argument("--sample", type=int, help="index of a trajectory in the file, from 0; default: all")
    parser.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="precision of the stored fields"
    )
    about = "further models with the same tokenizer, such as other seeds or checkpoints: predict their mean and spread"
    parser.add_argument("--members", type=path_or_url, nargs="+", default=[], metavar="MODEL", help=about)
    parser.add_argument("--no-paraview", dest="paraview", action="store_false", help="write no .vtkhdf file")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_tokenizer_option(parser)
    add_debug(parser)


def _predict(options: argparse.Namespace) -> None:
    from shodh_moe.inference.predict import Request, predict

    names = ("input", "output", "steps", "start", "stride", "sample", "dtype", "paraview", "overwrite")
    given = {name: getattr(options, name) for name in names}
    predict(options.checkpoint, Request(**given, members=tuple(options.members)), options.tokenizer)
