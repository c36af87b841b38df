"""What holds for all tests. Those with real clusters run only when asked: they need root, install, start daemons."""

from __future__ import annotations

import importlib

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "cluster" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("cluster")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge's limit is for its whole process, and this one has grown by other tests: it counts as a fresh one."""
    module = importlib.import_module("shodh_moe.merging.merge")  # the package has a function of that name
    monkeypatch.setattr(module, "resident", lambda: 300 << 20)
