"""The page about faults shows the committed results of the soak test."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.mark.usefixtures("importable")
def test_page_has_the_table_of_the_results() -> None:
    soak = importlib.import_module("soak")
    results = json.loads((BENCHMARKS / "results/soak_cpu.json").read_text())
    page = (BENCHMARKS.parent / "docs/faults.md").read_text()
    assert soak.summary(results["faults"]) in page
    assert f"{len(results['faults'])} faults" in page
    assert results["minutes"] == 120
    assert results["exit_code"] == 75
