"""Measuring, with real ranks and little time for each measurement."""

from __future__ import annotations

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.plan import measure as module
from shodh_moe.plan.layouts import compare
from shodh_moe.plan.machine import KINDS, read_machine, write_machine
from shodh_moe.plan.measure import measure


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_measure_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SHODH_MEASURE_SECONDS", "0.001")
    monkeypatch.setattr(module, "LIMIT_S", 250.0)
    made = measure([2])
    assert (made.device, made.per_node, made.source) == ("cpu", 2, "measured")
    assert set(made.rates(2).links) == set(KINDS)
    for rates in made.ranks.values():
        assert 1e-7 < rates.operation < 1e-2
        assert 1e7 < rates.products["float32"].at(1e8) < 1e13
        assert 1e6 < rates.memory.at(1e6) < 1e13
    write_machine(tmp_path / "machine.json", made)
    again = read_machine(tmp_path / "machine.json")
    assert again == made
    config = Config.model_validate({"data": {"grid": [32] * 3}, "training": {"batch_size": 4}})
    assert compare(config, 2, again).choices[0].prediction.step > 0
    with pytest.raises(UserError, match="4 ranks need more than one node of 2"):
        compare(config, 4, again)


def test_what_cannot_be_measured_is_refused():
    for ranks in ([0], [-1, 2]):
        with pytest.raises(UserError, match="--ranks"):
            measure(ranks)
    with pytest.raises(UserError, match=r"--dtypes float8 is not known: known are bfloat16, float32, float64"):
        measure([1], ["float8"])


def test_ranks_that_take_too_long_are_ended(monkeypatch):
    monkeypatch.setattr(module, "LIMIT_S", 0.1)
    with pytest.raises(UserError, match=r"--measure with 1 ranks did not end within 0.1 s"):
        measure([1])
