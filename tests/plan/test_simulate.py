"""Simulated steps: equal to the prediction if all ranks are equal, and by hand for one slow rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.plan import simulate as module
from shodh_moe.plan.loads import load_of_run
from shodh_moe.plan.machine import from_data_sheets, with_network
from shodh_moe.plan.predict import predict
from shodh_moe.plan.simulate import EVEN, Stragglers, simulate
from shodh_moe.plan.table import spread_table

pytest.importorskip("simpy")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NODES = with_network(from_data_sheets("h100"), "ib-ndr")


def cluster(*overrides: str) -> Config:
    return load_config(CONFIGS / "cluster_8x8.yaml", list(overrides))


CASES = {
    "samples": (),
    "tokens": ("parallel.exchange=token", "model.depth=3"),
    "no experts exchanged": ("parallel.ep_size=1", "parallel.zero_stage=0"),
    "accumulation": ("training.accumulation=3",),
    "slabs": ("parallel.context_size=2",),
    "slabs and tokens": ("parallel.context_size=2", "parallel.exchange=token", "model.depth=3"),
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_equal_ranks_take_the_predicted_time(overrides):
    config = cluster(*overrides)
    found = simulate(config, 16, NODES, EVEN, None, steps=2)
    assert found.steps == pytest.approx([predict(config, 16, NODES).step] * 2, rel=1e-9)


def test_everybody_waits_for_one_slow_rank(monkeypatch):
    factor_SW = np.ones((2, 16))
    factor_SW[1, 5] = 2.0  # in the second step
    monkeypatch.setattr(module, "_factors", lambda *_: factor_SW)
    config = cluster()
    found, even = simulate(config, 16, NODES, EVEN, None, steps=2), predict(config, 16, NODES)
    own = sum(even.compute.values()) + even.data
    assert found.steps == pytest.approx([even.step, even.step + own], rel=1e-9)


def test_a_stall_prolongs_a_step():
    found = simulate(cluster(), 16, NODES, Stragglers(0, 0, 1.0, 0.25), None, steps=1)
    assert found.mean == pytest.approx(found.predicted + 0.25)


def test_the_same_seed_gives_the_same_steps_and_more_ranks_are_slower():
    few, again, many = (simulate(cluster(), world, NODES, None, None, 5, 3) for world in (16, 16, 64))
    assert (few.steps == again.steps).all()
    assert few.predicted < few.mean
    assert few.mean / few.predicted < many.mean / many.predicted
    assert few.quantile(0.05) <= few.quantile(0.95)


def test_uneven_experts_slow_down_up_to_the_capacity():
    even = predict(cluster(), 8, NODES)
    passes = sum(even.compute.values()) - even.compute["optimizer"]
    one = simulate(cluster(), 8, NODES, EVEN, [1.0] + [0.0] * 7, 1)
    assert one.mean == pytest.approx(even.step + 0.25 * passes)  # all samples have one expert; capacity 1.25
    equal = simulate(cluster(), 8, NODES, EVEN, [1.0] * 8, 4)
    assert even.step <= equal.mean <= one.mean


def test_uneven_experts_with_tokens():
    config = cluster("parallel.exchange=token", "model.depth=3")
    even = predict(config, 8, NODES)
    one = simulate(config, 8, NODES, EVEN, [2.0] + [1.0] * 7, 1)
    assert one.mean == pytest.approx(even.step + (16 / 9 - 1) * even.compute["experts"])


@pytest.mark.parametrize("load", [[1.0], [0.0] * 8, [-1.0] + [1.0] * 7, [float("nan")] * 8])
def test_a_load_that_is_none_is_refused(load):
    with pytest.raises(UserError, match="for each of 8 experts"):
        simulate(cluster(), 8, NODES, EVEN, load, 1)


def test_simpy_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(UserError, match=r"pip install 'shodh_moe\[plan\]'"):
        simulate(cluster(), 8, NODES)


def test_the_table_separates_the_causes():
    text = spread_table(cluster(), 16, NODES, None, 3, 0)
    for words in ("3 steps of 16 ranks", "stragglers alone", "uneven experts alone", "assumed"):
        assert words in text


def test_the_load_of_a_run_is_that_of_its_last_record(tmp_path):
    loads = [[0.5, 0.5], [0.9, 0.1], [0.7, 0.3]]
    records = [
        {"kind": "train", "step": 1, "routing": [{"layer": 0, "load_all": loads[0]}]},
        {"kind": "train", "step": 2, "routing": [{"layer": n, "load_all": one} for n, one in enumerate(loads[1:])]},
        {"kind": "train", "step": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_of_run(tmp_path) == pytest.approx([0.8, 0.2])
    with pytest.raises(UserError, match="no routing record"):
        load_of_run(tmp_path / "empty")
