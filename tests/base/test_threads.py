"""Independent items computed in threads: order, errors, threads of torch."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shodh_moe.base import threads as module
from shodh_moe.base.threads import map_in_threads


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are four cores."""
    monkeypatch.setattr(module, "available_cores", lambda: 4)


def test_results_come_in_order_and_each_worker_has_one_torch_thread():
    def compute(number: int) -> tuple[int, int, bool]:
        time.sleep(0.02 * (number % 3 == 0))  # items finish in another order
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    assert list(map_in_threads(compute, range(20), 1)) == [(number, 1, False) for number in range(20)]
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_items_are_read_only_a_little_ahead():
    read = []
    results = map_in_threads(lambda number: number, (read.append(n) or n for n in range(100)), 1)
    assert next(results) == 0
    assert len(read) <= 9
    results.close()
    assert len(read) <= 9


def test_an_error_ends_the_iteration_and_the_threads():
    def compute(number: int) -> int:
        if number == 3:
            raise ValueError("item 3")
        return number

    before, threads = torch.get_num_threads(), threading.active_count()
    results = map_in_threads(compute, range(100), 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    assert threading.active_count() == threads
    assert torch.get_num_threads() == before


def test_results_do_not_depend_on_the_number_of_cores(monkeypatch):
    convolution = torch.nn.Conv3d(3, 8, 3)
    batches = [torch.randn(2, 3, 12, 12, 12) for _ in range(6)]
    four = list(map_in_threads(convolution, batches, 1))
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    one = list(map_in_threads(convolution, batches, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_workers_share_the_cores_if_memory_is_short():
    def compute(number: int) -> int:
        time.sleep(0.01)
        running.add(threading.get_ident())
        return torch.get_num_threads()

    running: set[int] = set()
    assert set(map_in_threads(compute, range(20), module.MEMORY // 2)) == {2}
    assert len(running) <= 2
    assert set(map_in_threads(compute, range(4), 3 * module.MEMORY)) == {4}
