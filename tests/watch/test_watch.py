"""`shodh watch`: what it answers, to whom, and what a browser shows while records arrive."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shodh_moe.base.network import free_port
from shodh_moe.report.run.flow_3d import NAME
from shodh_moe.watch.forecasts import Forecasts
from shodh_moe.watch.server import LOOPBACK, Watched, make_server
from shodh_moe.watch.state import MOST_POINTS, charts_of
from tests.browser import chromium, needs_chromium
from tests.tiny import refused
from tests.trackers.runs import make_run, record
from tests.trained import make_run as make_trained_run


@contextmanager
def serving(watched: Watched) -> Iterator[str]:
    server = make_server(watched, LOOPBACK, free_port())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def write(run: Path, records: list[dict[str, Any]]) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_charts_show_all_records_in_few_points(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    assert charts_of(run) == {"step": 0, "charts": []}
    write(run, [{**record(step), "learning_rate": 0.001 * step} for step in range(1, 1001)])
    write(run, [record(1000, "valid")])
    found = charts_of(run)
    charts = {chart["title"]: chart["lines"] for chart in found["charts"]}
    assert found["step"] == 1000
    assert list(charts) == [
        "Training loss", "Held-out latent MSE", "Learning rate", "Share of tokens by expert, layer 0",
    ]  # fmt: skip
    assert charts["Learning rate"][0]["points"][-1] == (1000, 1.0)
    assert len(charts["Learning rate"][0]["points"]) <= MOST_POINTS
    shares = charts["Share of tokens by expert, layer 0"]
    assert [(line["name"], line["points"][0][1]) for line in shares] == [
        ("calm, expert 0", 0.25),
        ("calm, expert 1", 0.75),
    ]


def test_the_server_gives_only_its_own_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    (run / "report").mkdir()
    (run / "report" / NAME).write_text("a view")
    with serving(Watched(run, None)) as url:
        assert json.loads(get(f"{url}/state.json")[1])["steps"] == 7
        write(run, [record(3)])
        assert json.loads(get(f"{url}/state.json")[1])["step"] == 3
        assert get(f"{url}/report/{NAME}") == (200, "a view")
        for path in (
            "/config.yaml",
            "/report/../config.yaml",
            "/report/%2e%2e/config.yaml",
            "/forecast/calm.png",
            "/x",
        ):
            assert get(url + path)[0] == 404, path
        assert get(f"{url}/state.json", Host="attacker.example")[0] == 403
        (run / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
        assert "metrics.jsonl line 1 is not JSON" in json.loads(get(f"{url}/state.json")[1])["error"]


def test_wrong_use_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "small")
    with serving(Watched(run, None)) as url:
        port = url.rpartition(":")[2]
        says = (f"port {port} of 127.0.0.1 is not free (in use by", "choose another with --port")
        refused(capfd, "watch", str(run), "--port", port, says=says)
    refused(capfd, "watch", str(run), "--port", "99999", says=("port 99999", "choose another"))
    refused(capfd, "watch", str(run), "--every", "0", says=("--every 0", "at least 1"))
    refused(capfd, "watch", str(tmp_path), says=("there is no run folder", "has started"))


@needs_chromium
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_grows_with_the_run(tmp_path: Path) -> None:
    """It also shows a forecast of the newest checkpoint, which another process draws."""
    run = make_trained_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    (tmp_path / "pictures").mkdir()
    forecasts = Forecasts(run, tmp_path / "pictures", 1)
    try:
        with serving(Watched(run, forecasts)) as url, chromium(tmp_path) as browser:
            browser.open(url, 400)
            browser.wait("document.body.innerText.includes('waiting for the first records')")
            write(run, [record(step) for step in (1, 2)])
            browser.wait("document.body.innerText.includes('step 2 of')")
            lines = browser.run("return document.querySelector('polyline').getAttribute('points')")
            write(run, [record(3), record(3, "valid")])
            browser.wait("document.body.innerText.includes('step 3 of')")
            assert browser.run("return document.querySelector('polyline').getAttribute('points')") != lines
            browser.wait("document.images.length == 2 && [...document.images].every(i => i.naturalWidth > 500)", 200)
            assert "Forecast of the checkpoint of step 7" in browser.run("return document.body.innerText")
            assert browser.sideways() == 0
            assert all(name.startswith(url) for name in browser.loaded())
            (tmp_path / "page.png").write_bytes(browser.picture())
    finally:
        forecasts.stop()
    assert forecasts.now["error"] == ""
