"""Measuring families whose regimes are not those of the built-in ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shodh_moe.ccm.bench.aims import ROWS
from shodh_moe.ccm.bench.config import checkpoint_of_last_step
from shodh_moe.ccm.bench.measure import measure, measured
from shodh_moe.ccm.bench.run import report
from shodh_moe.ccm.bench.vary import vary
from shodh_moe.ccm.expert import make_network
from tests.ccm.bench.experts import KEY, bench, write_experts, write_truth
from tests.ccm.synthetic import CHANNELS, GRID, SCALE, SNAPSHOTS, initial, save_expert, write_split


def test_validation_and_tests_may_lie_on_one_side_only(tmp_path: Path) -> None:
    places = {"validation": [0.6], "interpolation": [], "ood_low": [], "ood_high": [1.35], "support": [0.0]}
    family = {"name": KEY, "root": str(tmp_path / "data"), "grid": GRID, "snapshots": SNAPSHOTS, "coordinates": places}
    fine_tuning = {"steps": 1, "learning_rates": [1e-3]}
    config = bench(tmp_path, {"shared": {"direction": "none"}}, family=family, fine_tuning=fine_tuning)
    made = write_experts(config)
    conditioned = config.expert(KEY, 0, "conditioned")
    network = make_network(conditioned.network, len(CHANNELS), 0)
    save_expert(checkpoint_of_last_step(conditioned), conditioned, network, SCALE, CHANNELS)
    write_truth(config, made[f"{KEY}-0-low"], made[f"{KEY}-0-high"])
    still = torch.cat([initial(5, count=1)] * SNAPSHOTS, dim=1)
    write_split(config.expert(KEY, 0, "anchor"), "support", {0.0: still})
    result = json.loads(measure(config, KEY, 0).read_text())
    assert measured(config, KEY, 0)
    assert [(regime["split"], regime["coordinate"]) for regime in result["regimes"]] == [("ood_high", 1.35)]
    assert set(result["regimes"][0]["rows"]) == set(ROWS)
    # No validation regime lies at s < 0, so those at s > 0 decide for both sides.
    assert result["chosen"]["best_endpoint"]["low"] == result["chosen"]["best_endpoint"]["high"]
    vary(config, KEY, 0)
    summary = report(config)
    assert list(summary["variants"][KEY]) == ["unchanged", "shared"]
    assert "variants" in summary["families"][KEY]["cpu_seconds"]
    text = (config.folder / "report" / "summary.md").read_text()
    assert "\n## Variants\n" in text
    assert "## Backbones" not in text
