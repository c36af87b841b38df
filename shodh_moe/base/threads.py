"""Compute independent items in threads that use one core each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from shodh_moe.base.cores import available_cores

MEMORY = 8 << 30  # bytes for all workers together
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], bytes_per_item: int) -> Iterator[Result]:
    """Yield ``function(item)`` for each item in order, without gradients.

    Each worker computes whole items, with a single thread for torch's operations. Threads that share one operation wait
    for each other after every part of it; on a machine with other work they spend most of their time waiting. If memory
    does not suffice for a worker on every core, the workers share the cores. With a worker on every core, the results
    do not depend on the number of cores.

    Args:
        items: read ahead by at most one item per worker.
        bytes_per_item: memory that one call needs; all calls together get `MEMORY`, or one call if that is more.
    """
    cores, threads = available_cores(), torch.get_num_threads()
    workers = max(1, min(cores, MEMORY // max(bytes_per_item, 1)))
    remaining = iter(items)
    running: deque[Future[Result]] = deque()

    @torch.no_grad()
    def compute(item: Item) -> Result:
        return function(item)

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,))
    try:
        running.extend(pool.submit(compute, item) for item in islice(remaining, 2 * workers))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(compute, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
