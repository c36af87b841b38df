"""Settings for all tests: which ones run, how many processes share them, and in which order.

Two pytest-xdist workers share the whole suite, one file at a time, so that a file's fixtures are made once. All files
with tests that start several ranks go to one worker: ranks never run beside other ranks. Files with slow tests come
first, so that no worker is left with a long one at the end. A command that selects tests runs in one process.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from shodh_moe.base.cores import available_cores

WORKERS = 2
RANKS = "ranks"  # the group of all tests that start several ranks

# The wall time of one example means nothing on a machine that is busy with other tests.
settings.register_profile("busy machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_configure(config: pytest.Config) -> None:
    if _is_worker(config):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; processes of tests inherit it


@pytest.hookimpl(optionalhook=True)  # a GPU machine may have no pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Number of workers for ``-n auto``; 0 runs the tests in this process."""
    chosen = config.args_source is config.ArgsSource.ARGS or config.option.keyword or config.getoption("lf", False)
    cores = available_cores()
    return 0 if chosen or _wants_clusters(config) or cores == 1 else min(WORKERS, cores)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, and all files that start ranks to the same worker.

    Groups (``--dist=loadgroup``) would say the same, but those of pytest-xdist 3.8 are lost under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return RANKS if _starts_ranks(config.rootpath / file) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _wants_clusters(config):  # real clusters need root, install packages and start daemons
        deselected = [item for item in items if item.get_closest_marker("cluster")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    if _is_worker(config):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (not _starts_ranks(item.path), item.path not in slow))


@cache
def _starts_ranks(file: Path) -> bool:
    """Whether a file has a test with the mark `distributed`. The process that schedules tests sees their names only."""
    return "pytest.mark.distributed" in file.read_text(encoding="utf-8")


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _wants_clusters(config: pytest.Config) -> bool:
    return "cluster" in (config.option.markexpr or "")


@pytest.fixture(autouse=True)
def _memory_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report the memory of a fresh process: a merge's limit covers memory that earlier tests left in this one."""
    module = importlib.import_module("shodh_moe.merging.merge")  # the package has a function of that name
    monkeypatch.setattr(module, "resident", lambda: 300 << 20)


@pytest.fixture(autouse=True)
def _same_threads_for_torch() -> Iterator[None]:
    """Undo what numba's parallel kernels do to torch: both set the thread count of the one OpenMP library."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """Let the processes of tests obey SIGHUP and SIGINT even under ``nohup`` or in a background job."""
    defaults = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ignored = [number for number in defaults if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """An object server (tests/object_server.py), one for all tests of a file."""
    from tests.object_server import object_server  # slow

    with object_server() as server:
        yield server
