"""The page of the service in a browser: a forecast of the example, on a wide and on a narrow screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh_moe.inference.export import export
from tests.serving.running import Service, service
from tests.trained import make_run

pytest.importorskip("fastapi")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("page")
    export(make_run(folder, operator="staggered", walls="exact"), folder / "model")
    with service(folder / "model") as found:
        yield found


def browse(url: str, profile: Path, *options: str) -> str:
    """Open a page in Chromium, wait until it has nothing more to do, and return the document."""
    assert BROWSER is not None
    quiet = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    command = [BROWSER, *quiet.split(), "--disable-sync", "--no-first-run", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=60000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_forecast_and_shown(running: Service, tmp_path: Path) -> None:
    page = browse(f"{running.url}#example", tmp_path / "profile", "--window-size=400,1200", "--dump-dom")
    assert "trained, training step 7. Send 2 snapshots" in page
    assert "Forecast of 5 steps on 16 x 8 x 24 voxels." in page
    assert '<div id="result">' in page  # no longer hidden
    assert re.search(r'<canvas id="picture"[^>]* width="16" height="8"', page)
    assert "5 of 5" in page


def test_nothing_scrolls_sideways_at_400_pixels(running: Service, tmp_path: Path) -> None:
    """A frame as wide as a phone measures the page in it."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    text = running.ask("GET", "/")[1].decode()

    class Framed(BaseHTTPRequestHandler):
        """Serves the page with a result shown, and a page around it that tells its width."""

        def do_GET(self) -> None:
            inner = text.replace('id="result" hidden', 'id="result"')
            outer = (
                "<iframe id=f src=/inner style='width:400px;height:900px'></iframe><p id=w></p>"
                "<script>f.onload = () => { w.textContent = "
                "'width ' + f.contentDocument.documentElement.scrollWidth }</script>"
            )
            data = (inner if self.path == "/inner" else outer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Framed)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = browse(f"http://127.0.0.1:{server.server_address[1]}/", tmp_path / "profile", "--dump-dom")
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r"width (\d+)", page)
    assert found, page
    assert int(found[1]) <= 400


def test_the_page_asks_no_other_server(running: Service) -> None:
    text = running.ask("GET", "/")[1].decode()
    assert re.findall(r"https?://|//[a-z]+\.", text) == []
