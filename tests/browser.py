"""A headless Chromium for tests of pages, driven by chromedriver in the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from shodh_moe.base.network import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
FLAGS += ["--disable-dev-shm-usage"]
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="pages are only looked at where Chromium and chromedriver are installed"
)


class Browser:
    """One page of a browser."""

    def __init__(self, server: str, session: str):
        self._base = f"{server}/session/{session}"

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Open an address in a window of this size in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        _post(f"{self._base}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        _post(f"{self._base}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return _post(f"{self._base}/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """Wait until a JavaScript expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, (
                f"{condition} did not become true: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.1)
        return value

    def drag(self, selector: str, x: int, y: int) -> None:
        """Drag an element with the mouse by a number of pixels."""
        find = {"using": "css selector", "value": selector}
        element = _post(f"{self._base}/element", find)
        move = {"type": "pointerMove", "duration": 50}
        steps = [{**move, "origin": element, "x": 0, "y": 0}, {"type": "pointerDown", "button": 0}]
        steps += [{**move, "origin": "pointer", "x": x, "y": y}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        _post(f"{self._base}/actions", {"actions": [mouse]})

    def picture(self) -> bytes:
        """Return the window as PNG."""
        with urllib.request.urlopen(f"{self._base}/screenshot", timeout=60) as answer:
            return base64.b64decode(json.load(answer)["value"])

    def sideways(self) -> int:
        """Return by how many pixels the page scrolls sideways."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def loaded(self) -> list[str]:
        """Return the addresses of what the page has loaded besides itself."""
        return list(self.run("return performance.getEntriesByType('resource').map(entry => entry.name)"))


@contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[Browser]:
    """Start a browser that keeps its files in a new folder."""
    port = free_port()
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    server = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{server}/status", timeout=5).close()
                break
            assert time.monotonic() < deadline, "chromedriver does not start"
            time.sleep(0.1)
        arguments = [*FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        yield Browser(server, _post(f"{server}/session", wanted)["sessionId"])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=110) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None
