"""The walls study runs, and its file contains the numbers that the docs quote."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.tiny import write_dataset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_file_has_the_accuracy_of_every_kind_of_walls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    data = write_dataset(tmp_path / "theirs")
    out = tmp_path / "walls.json"
    arguments = ["--quick", "--device", "cpu", "--json", str(out), "--data", str(data)]
    assert importlib.import_module("studies.walls").main(arguments) == 0
    found = json.loads(out.read_text())
    assert len(found["projections"]) == 2 * 10 * 2
    for row in found["projections"]:
        assert row["divergence_rms"] <= (1e-13 if row["dtype"] == "float64" else 1e-5)
        assert (row["solid_velocity_max"] == 0) == (row["walls"] != "none")
        assert (row["iterations"] > 0) == (row["walls"] != "none")
    assert {row["domain"] for row in found["floor"]} == {"calm", "wild"}
    assert len(found["floor"]) == 2 * 10
    assert all(row["relative_difference"] > 0 for row in found["floor"])
    assert str(tmp_path) not in out.read_text()
