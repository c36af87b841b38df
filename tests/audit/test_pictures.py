from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shodh_moe.audit.page import write_page
from shodh_moe.audit.pictures import draw
from shodh_moe.audit.summary import summarise
from shodh_moe.report import style
from tests.audit.synthetic_results import MAIN, all_results, diverge, result, tuning


def is_drawn(path: Path) -> bool:
    """Return whether the picture has enough pixels of several colours."""
    pixels = imread(path)[..., :3]
    inked = (pixels < 0.98).any(-1)
    return min(pixels.shape[:2]) > 100 and inked.mean() > 0.01 and len(np.unique(pixels[inked], axis=0)) > 20


def test_all_pictures_and_the_page_are_made_even_of_diverged_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "DPI", 60)  # drawing takes most of the time
    results = all_results(2)
    for run in results:
        if run["arm"] == "no_shared" or (run["arm"], run["seed"]) in (("moe", 1), ("dense_active", 0)):
            diverge(run)
        if run["arm"] == "random":
            run["errors"][MAIN[0]]["latent_mse"] *= 50
    maps = {MAIN[1]: {"expert_map": np.arange(128).reshape(2, 4, 4, 4) % 2, "solid_fraction": np.ones((4, 4, 4))}}
    summary = summarise(results, tuning())
    pictures = draw(results, summary, tmp_path, maps)
    names = {
        "transfer_main",
        "transfer_hard",
        "four",
        "load",
        "gradients",
        "swap",
        "kinship",
        "relearning",
        "routing_map_porous_media",
    }
    assert {path.stem for path in pictures} == names == {path.stem for path in tmp_path.iterdir()}
    assert all(is_drawn(path) for path in pictures)
    page = write_page(summary, pictures, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert page.index("Does the mixture of experts end negative transfer") < page.index("<table>")
    assert "http" not in page
    assert "**" not in page


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "swap.png").write_bytes(b"old")
    results = [result("main", "dense_active", MAIN, 0)]
    results[0]["relearning"] = None
    assert {path.stem for path in draw(results, summarise(results, {}), tmp_path)} == {"gradients"}
    assert not (tmp_path / "swap.png").exists()
