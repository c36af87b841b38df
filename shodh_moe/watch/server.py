"""A server on this machine for the page of a run in training. It only reads, and needs no network."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import port_holder
from shodh_moe.base.records import METRICS
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.report.page import render
from shodh_moe.watch.forecasts import Forecasts
from shodh_moe.watch.state import charts_of

LOOPBACK = "127.0.0.1"
PORT = 8765  # tried first
NICE = 10
POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:"
REPORT = {".html": "text/html; charset=utf-8", ".png": "image/png"}


class Watched:
    """A run folder as its page shows it. Its records are read again when they have changed."""

    def __init__(self, run: Path, forecasts: Forecasts | None):
        self.run, self.forecasts = run, forecasts
        self._seen: tuple[int, int] | None = None
        self._charts: dict[str, Any] = {"step": 0, "charts": []}

    def state(self) -> dict[str, Any]:
        """Return what the page draws."""
        error = ""
        path = self.run / METRICS
        try:
            found = path.stat()
            if (seen := (found.st_mtime_ns, found.st_size)) != self._seen:
                self._charts, self._seen = charts_of(self.run), seen
        except FileNotFoundError:
            pass
        except (UserError, KeyError, TypeError) as problem:
            error = str(problem)
        forecast = self.forecasts.now if self.forecasts else {"step": None, "domains": [], "error": ""}
        report = (self.run / "report" / "index.html").is_file()
        return {**self._charts, "steps": self._steps(), "forecast": forecast, "report": report, "error": error}

    def _steps(self) -> int | None:
        try:
            steps = parse_yaml((self.run / "config.yaml").read_text(encoding="utf-8"))["training"]["steps"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return steps if isinstance(steps, int) else None


def make_server(watched: Watched, host: str, port: int | None) -> ThreadingHTTPServer:
    """Listen on a port; None takes `PORT`, or another one if that is in use.

    Raises:
        UserError: the port is in use, or may not be used.
    """
    for wanted in (PORT, 0) if port is None else (port,):
        try:
            return _Server((host, wanted), _handler(watched, loopback=host == LOOPBACK))
        except (OSError, OverflowError) as error:
            problem, holder = error, port_holder(wanted)
            if port is not None:
                break
    reason = f"in use by {holder}" if holder else getattr(problem, "strerror", None) or str(problem)
    raise UserError(f"port {port} of {host} is not free ({reason}): choose another with --port, or leave it out")


class _Server(ThreadingHTTPServer):
    allow_reuse_address = False  # a second server on the same port must fail
    daemon_threads = True


def _handler(watched: Watched, loopback: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if loopback and not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", self.headers.get("Host", "")):
                self.send_error(403, "this server answers only requests to 127.0.0.1")  # not to a name that leads here
                return
            answer = _answer(watched, self.path.partition("?")[0])
            if answer is None:
                self.send_error(404)
                return
            kind, body = answer
            self.send_response(200)
            # The 3D view of the report has its own scripts and nothing from elsewhere, like the page.
            self.send_header("Content-Type", kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing for a request."""

    return Handler


def _answer(watched: Watched, path: str) -> tuple[str, bytes] | None:
    """Return type and content of what a request asks for; None if there is no such thing. No path is taken from it."""
    if path == "/":
        return REPORT[".html"], render("watch.html.j2", run=watched.run.resolve().name).encode()
    if path == "/state.json":
        return "application/json", json.dumps(watched.state()).encode()
    if path == "/favicon.ico":
        return "image/x-icon", b""
    if watched.forecasts:
        for domain in watched.forecasts.now["domains"]:
            if path == f"/forecast/{domain}.png" and (content := watched.forecasts.picture(domain)):
                return REPORT[".png"], content
    report = {f"/report/{one.name}": one for one in (watched.run / "report").glob("*") if one.suffix in REPORT}
    if path in report:
        return REPORT[report[path].suffix], report[path].read_bytes()
    return None


def watch(
    run: Path,
    port: int | None = None,
    host: str = LOOPBACK,
    every: int = 1,
    forecast: bool = True,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the page of a run until the process is interrupted.

    Args:
        every: draw a new forecast after at least this many steps, when there is a new checkpoint.
        ready: is called with a line that names the address.

    Raises:
        UserError: there is no such run folder, or the port cannot be used.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"there is no run folder {run}: give the folder of a run whose training has started")
    if every < 1:
        raise UserError(f"--every {every}: give a number of steps, at least 1")
    watched = Watched(run, None)
    server = make_server(watched, host, port)
    os.nice(NICE)  # the training goes first; forecasts inherit this
    with tempfile.TemporaryDirectory(prefix="shodh-watch-") as folder:
        watched.forecasts = Forecasts(run, Path(folder), every) if forecast else None
        try:
            ready(f"[watch] {run} at http://{host}:{server.server_address[1]}/ until Ctrl-C")
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
            if watched.forecasts:
                watched.forecasts.stop()
