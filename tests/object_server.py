"""An object server like S3 on this machine, with a proxy before it that can break transfers and counts their bytes."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import fsspec
import pytest
from s3fs import S3FileSystem

from shodh_moe.base import remote

ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class ObjectServer:
    """Addresses of the server, and what its proxy has seen.

    Attributes:
        direct: address of the server itself.
        url: address of the proxy.
        sent: bytes of objects that clients have received, by the path of the object.
        requests: method and path of every request.
        fail_after: number of answers with data after which the proxy cuts every connection; None: never.
        hold_after: number of answers with data after which all further ones wait for ``released``; None: never.
    """

    direct: str
    url: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_after: int | None = None
    hold_after: int | None = None
    held: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)

    def reset(self) -> None:
        self.hold_after = None
        self.held.clear()
        self.released.clear()
        self.sent.clear()
        self.requests.clear()
        self.fail_after = None


def fresh_bucket(server: ObjectServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test and its processes use the server, with an empty ``s3://bucket`` and an empty cache in ``folder``."""
    server.reset()
    for name, value in {**ACCESS, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHODH_CACHE", str(folder / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(remote, "_checked", set())
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()  # one of another server
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Run a server within the block; it starts empty."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    server = ObjectServer(f"http://{host}:{port}")

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else None
            server.requests.append(f"{self.command} {self.path}")
            upstream = http.client.HTTPConnection(host, port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            path = self.path.split("?")[0]
            moves_data = self.command in ("GET", "PUT", "POST") and "list-type" not in self.path
            if moves_data and server.hold_after is not None:
                server.hold_after -= 1
                if server.hold_after < 0:
                    server.held.set()
                    server.released.wait(60)
            if moves_data and server.fail_after is not None:
                if server.fail_after <= 0:
                    self.connection.close()
                    self.close_connection = True
                    return
                server.fail_after -= 1
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
                server.sent[path] = server.sent.get(path, 0) + len(data)
            upstream.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:  # clients are killed
            pass

    proxy = Quiet(("127.0.0.1", 0), Proxy)
    server.url = f"http://127.0.0.1:{proxy.server_address[1]}"
    Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
