"""``shodh watch``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option
from shodh_moe.base.errors import EXIT_DONE
from shodh_moe.cli.common import add_command, add_debug


def add_watch(commands: Any) -> None:
    text = "show a run in the browser while it trains"
    parser = add_command(commands, "watch", text, "example: shodh watch runs/quickstart", _watch)
    parser.set_defaults(needs_torch=False)
    parser.add_argument("run", type=path_option, help="run folder")
    parser.add_argument("--port", type=int, help="port of this machine; default: 8765, or another one if it is in use")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; default: %(default)s, which only this machine reaches",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="STEPS",
        help="draw the forecast of a new checkpoint after at least this many steps; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--no-forecast", dest="forecast", action="store_false", help="draw no forecasts")
    add_debug(parser)


def _watch(options: argparse.Namespace) -> int:
    from shodh_moe.watch.server import watch

    watch(options.run, options.port, options.host, options.every, options.forecast)
    return EXIT_DONE
