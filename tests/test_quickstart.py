"""Results that the quickstart must reach, checked on the run that `make pretrain` left in this checkout, if any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
METRICS = ROOT / "runs" / "quickstart" / "metrics.json"

pytestmark = pytest.mark.skipif(not METRICS.exists(), reason="no quickstart run here: `make pretrain` makes one")


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads(METRICS.read_text())


@pytest.mark.parametrize("domain", ["open_channel", "porous_media"])
@pytest.mark.parametrize("quantity", ["latent_mse", "physical_mse"])
def test_the_model_beats_persistence_and_the_mean_predictor(metrics, domain, quantity):
    scores = metrics["domains"][domain]
    assert scores[quantity] < scores[f"{quantity}_persistence"]
    assert scores[quantity] < scores[f"{quantity}_mean"]


def test_the_velocity_is_divergence_free_up_to_rounding(metrics):
    divergence = metrics["divergence"]
    assert (divergence["operator"], divergence["dtype"]) == ("staggered", "float64")
    assert 0 < divergence["rms_relative"] <= 1e-12


def test_the_router_gives_each_domain_an_expert_of_its_own(metrics):
    assert metrics["routing"]["bifurcated"]


def test_without_a_gpu_experts_were_sharded_over_two_ranks(metrics):
    environment = json.loads((METRICS.parent / "environment.json").read_text())
    if not environment["devices"]:
        assert (metrics["world_size"], metrics["ep_size"]) == (2, 2)
