"""``shodh serve``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option, path_or_url
from shodh_moe.cli.common import MODEL, add_command, add_debug


def add_serve(commands: Any) -> None:
    example = "example: shodh serve trial_model --port 8000"
    parser = add_command(commands, "serve", "answer forecasts over HTTP, with a page for the browser", example, _serve)
    parser.add_argument("model", type=path_or_url, metavar="MODEL", help=MODEL)
    about = "address to listen on; default: %(default)s, this machine alone; there is no login"
    parser.add_argument("--host", default="127.0.0.1", help=about)
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one; default: %(default)s")
    parser.add_argument("--example", type=path_option, metavar="FILE", help="HDF5 file with the page's example flow")
    limits = (
        ("--max-steps", int, 100, "largest number of snapshots to predict"),
        ("--max-megabytes", int, 256, "largest body of a request, also unpacked"),
        ("--max-seconds", float, 120.0, "time for a body to arrive, and for its forecast"),
        ("--max-waiting", int, 16, "requests that are held at a time; more are refused (503)"),
        ("--max-batch", int, 4, "requests that are computed together"),
    )
    for name, kind, default, about in limits:
        parser.add_argument(name, type=kind, default=default, help=f"{about}; default: %(default)s")
    add_debug(parser)


def _serve(options: argparse.Namespace) -> None:
    from shodh_moe.base.errors import UserError
    from shodh_moe.serving.limits import Limits
    from shodh_moe.serving.server import serve

    for name in ("max_steps", "max_megabytes", "max_seconds", "max_waiting", "max_batch"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a positive number")
    limits = Limits(
        options.max_megabytes * 2**20, options.max_steps, options.max_seconds, options.max_waiting, options.max_batch
    )
    serve(options.model, options.host, options.port, limits, options.example)
