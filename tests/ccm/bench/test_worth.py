"""What each way to new regimes costs, by hand, and the page made from the measured benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.bench.worth import REGIMES, WAYS, break_even, costs, markdown, rules

MEASURED = Path(__file__).resolve().parents[3] / "docs" / "ccm"


@pytest.fixture
def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MEASURED / "summary.json").read_text())
    return found


def test_costs_follow_from_the_times_of_the_benchmark(summary: dict[str, Any]) -> None:
    config = BenchConfig.model_validate(summary["config"])
    family, one = summary["families"]["reaction_diffusion"], config.families["reaction_diffusion"]
    seconds, seeds = family["cpu_seconds"], len(family["seeds"])
    found = costs(family, one, gpu=False)
    expert = (seconds["low"] + seconds["high"]) / 2 / seeds
    trajectories = 5 * 128 + 2 * 256 + 8 * 12 + 4 * 16
    assert found["expert"]["each"] == pytest.approx(expert + seconds["data"] * 256 / trajectories)
    assert found["anew"]["each"] - found["expert"]["each"] == pytest.approx(seconds["anchor"] / seeds - expert)
    assert (found["conditioned"]["once"], found["conditioned"]["each"]) == (seconds["conditioned"] / seeds, 0)
    # Two thirds of the experts' steps unroll once and a third twice, in batches of 10; K frames take 40 steps of 16.
    assert found["frames"]["each"] == pytest.approx(expert * 40 * 16 / (600 * 10 * 4 / 3))
    assert found["frames"]["estimated"]
    assert not found["expert"]["estimated"]
    measured = costs({**family, "seconds": {"merge": 1.0, "prefix": 3.0, "fine_tuned": 6.0}}, one, gpu=False)
    assert [measured[way]["each"] for way in ("coordinate", "prefix", "frames")] == [1.0, 3.0, 6.0]
    assert not measured["prefix"]["estimated"]
    on_gpu = costs({**family, "wall_seconds": {name: 2 * value for name, value in seconds.items()}}, one, gpu=True)
    assert on_gpu["anew"]["each"] == pytest.approx(2 * found["anew"]["each"])
    assert break_even({"each": 2.0}, {"once": 10.0}) == 5
    assert break_even({"each": 0.0}, {"once": 10.0}) == math.inf


def test_the_page_in_docs_is_made_from_its_numbers(summary: dict[str, Any]) -> None:
    page = markdown(summary)
    assert (MEASURED / "worth.md").read_text() == page
    for way in WAYS.values():
        assert page.count(f"| {way} | ") == len(summary["families"])
    assert all(f"N = {n}, CPU hours" in page for n in REGIMES)


def test_rules_hold_only_where_the_numbers_say_so(summary: dict[str, Any]) -> None:
    config = BenchConfig.model_validate(summary["config"])
    found = " ".join(rules(summary, config))
    assert "Beyond the ends, merging" in found
    assert "on shallow water it is better than CCM there" in found
    assert "Train a conditioned network" in found
    summary["families"]["shallow_water"]["cpu_seconds"] |= dict.fromkeys(("low", "high", "data"), 0.0)  # not recorded
    assert "Train a conditioned network" not in " ".join(rules(summary, config))
    summary["families"]["navier_stokes"]["rows"]["ccm_coordinate"]["ood"]["value"] = 1.0
    assert "Beyond the ends" not in " ".join(rules(summary, config))
