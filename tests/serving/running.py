"""A service in a process of its own, as `shodh serve` starts it, and a client of it."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.data.dataset import Fields


@dataclass
class Service:
    """Where a service is, and its process."""

    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Send a request; return status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def error(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        """Post a body that is refused; return the status and the reason."""
        status, said = self.ask("POST", path, body, **headers)
        found = json.loads(said)
        assert list(found) == ["error"], found
        assert "\n" not in found["error"]
        return status, found["error"]


@contextmanager
def service(model: Path, *options: str, one_thread: bool = True) -> Iterator[Service]:
    """Run `shodh serve` on a free port within the block."""
    command = [sys.executable, "-m", "shodh_moe.cli", "serve", str(model), "--port", "0", *options]
    threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("[serve]"), line
        yield Service(int(line.rstrip("/\n").rpartition(":")[2]), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def npz(fields: Fields | dict[str, Any], **more: Any) -> bytes:
    """The body of a request."""
    out = io.BytesIO()
    np.savez(out, **{name: np.asarray(values) for name, values in {**fields, **more}.items()})
    return out.getvalue()


def arrays(body: bytes) -> dict[str, Any]:
    """The arrays of an answer."""
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return dict(file)
