"""The 3D view of a report: its volumes, and what a browser draws of them."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shodh_moe.report.run.flow_3d import MOST_VOXELS, _coarse, pack, write_flow_3d
from shodh_moe.report.run.load import load_run
from tests.browser import chromium, needs_chromium
from tests.report.test_report import make_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("view") / "quickstart")
    path = write_flow_3d(load_run(run), run)
    assert path is not None
    return path


def test_volumes_are_packed_as_a_texture_takes_them() -> None:
    solid, speed = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    solid[1, 0, 0], speed[0, 2, 3] = 1, 0.5
    values = np.frombuffer(base64.b64decode(pack(solid, speed)), np.uint8).reshape(4, 3, 2, 2)
    assert values[0, 0, 1].tolist() == [255, 0]
    assert values[3, 2, 0].tolist() == [0, 128]
    assert values.sum() == 255 + 128


def test_large_volumes_are_averaged() -> None:
    volume = np.random.default_rng(0).random((2 * MOST_VOXELS, 20, 9))
    coarse = _coarse(volume)
    assert coarse.shape == (MOST_VOXELS, 10, 4)
    assert coarse[3, 1, 2] == pytest.approx(volume[6:8, 2:4, 4:6].mean())
    assert _coarse(np.ones((8, 8, 8))).shape == (8, 8, 8)


def test_the_page_holds_every_domain_and_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="flows" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    flows = json.loads(found[1])
    assert [flow["name"] for flow in flows] == ["open channel", "porous media"]
    assert flows[0]["shape"] == [32, 32, 32]
    assert not re.search(r"<link|<iframe|@import|url\(|https?://|file:|src=", text, re.IGNORECASE)


def test_without_example_fields_there_is_no_view(page: Path) -> None:
    run = load_run(page.parent)
    run.arrays.clear()
    assert write_flow_3d(run, page.parent / "other") is None


@needs_chromium
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_browser_draws_it_and_turns_it(page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as browser:
        for width in (400, 1280):
            browser.open(page.as_uri(), width)
            browser.wait("document.getElementById('canvas').dataset.painted > 0")
            assert browser.sideways() == 0
            assert browser.loaded() == []
            assert browser.run("return document.getElementById('fallback').hidden")
        pixels = "return document.getElementById('canvas').toDataURL()"
        pictures = [browser.run(pixels)]
        drawn = "document.getElementById('canvas').dataset.painted"

        def change(script: str) -> None:
            before = browser.run(f"return {drawn}")
            browser.run(script)
            browser.wait(f"{drawn} > {before}")
            pictures.append(browser.run(pixels))

        for name, value in (("threshold", "0.2"), ("axis", "2"), ("place", "0.9"), ("field", "2"), ("domain", "1")):
            change(
                f"const e = document.getElementById('{name}'); e.value = '{value}'; e.dispatchEvent(new Event('input'))"
            )
        before = browser.run(f"return {drawn}")
        browser.drag("#canvas", 90, 40)
        browser.wait(f"{drawn} > {before}")
        pictures.append(browser.run(pixels))
        assert len(set(pictures)) == len(pictures)
        (tmp_path / "view.png").write_bytes(base64.b64decode(pictures[0].partition(",")[2]))
        assert imread(tmp_path / "view.png")[..., :3].std() > 0.1


@needs_chromium
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_webgl_it_says_so(page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path, "--disable-3d-apis") as browser:
        browser.open(page.as_uri(), 400)
        assert "WebGL 2" in browser.run("return document.body.innerText")
        assert browser.run("return document.getElementById('view').hidden")
        assert browser.sideways() == 0
