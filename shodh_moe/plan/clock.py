"""Time a call on all ranks of a node at the same time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

BUDGET_S = float(os.environ.get("SHODH_MEASURE_SECONDS", "0.2"))  # of one measurement; tests shorten it
INNER = {"cpu": 1, "cuda": 10}  # calls between two looks at the clock


def seconds(work: Callable[[], object], device: torch.device, inner: int | None = None, least: int = 3) -> float:
    """Time of a call: the median over at least ``least`` repetitions on the slowest rank (collective)."""
    inner = INNER[device.type] if inner is None else inner

    def once() -> float:
        began = time.perf_counter()
        for _ in range(inner):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / inner

    once()
    rounds = int(min(max(BUDGET_S / (_slowest(once(), device) * inner), least), 100))
    dist.barrier()
    return _slowest(statistics.median(once() for _ in range(rounds)), device)


def _slowest(value: float, device: torch.device) -> float:
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)
