"""Fixtures shared by the tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put benchmarks/ on the path, as it is when a script runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
