from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shodh_moe.ccm.bench.pictures import draw, draw_fields
from shodh_moe.ccm.bench.summary import summarise
from tests.ccm.bench.synthetic import result


def is_drawn(path: Path) -> bool:
    """Return whether the picture has enough pixels of several colours."""
    pixels = imread(path)[..., :3]
    inked = (pixels < 0.98).any(-1)
    return min(pixels.shape[:2]) > 300 and inked.mean() > 0.01 and len(np.unique(pixels[inked], axis=0)) > 20


def test_all_pictures_are_drawn_even_of_diverged_rollouts(tmp_path: Path) -> None:
    results = [result(family, seed) for family in ("reaction_diffusion", "shallow_water") for seed in range(2)]
    results[0]["regimes"][-1]["rows"]["wrong_sign"]["errors"][1] = None
    for one in results[:2]:
        one["curves"][0]["errors"] = dict.fromkeys(one["curves"][0]["errors"])
        for regime in one["regimes"]:
            regime["rows"]["anchor"]["errors"][0] = None
            del regime["rows"]["ties"]
    results[2]["straightness"]["bend"] = {"-2.0": None, "0.0": 0.1, "2.0": 30.0}
    pictures = draw(results, summarise(results), tmp_path / "report")
    names = {"alpha_curves.png", "ood.png", "regimes.png", "straightness.png"}
    assert {path.name for path in pictures} == names == {path.name for path in (tmp_path / "report").iterdir()}
    assert all(is_drawn(path) for path in pictures)


@pytest.mark.parametrize("blown_up", [False, True])
def test_fields_are_drawn(tmp_path: Path, blown_up: bool) -> None:
    x = np.linspace(0, 6, 24, dtype=np.float32)
    truth = np.sin(x[:, None]) * np.cos(x)
    anchor = np.full_like(truth, np.nan) if blown_up else 0.5 * truth
    example = {"truth": truth, "anchor": anchor, "best_endpoint": 0.8 * truth, "ccm": 0.95 * truth}
    draw_fields(example, "reaction-diffusion at s = -1.5", tmp_path / "fields.png")
    assert is_drawn(tmp_path / "fields.png")
