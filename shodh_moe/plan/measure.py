"""Measure how fast this machine computes and communicates (``shodh plan --measure``)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from shodh_moe.base.cores import available_cores
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.network import free_port
from shodh_moe.plan.machine import ASSUMED, PRODUCTS, Machine, Rates

LIMIT_S = 120.0  # for all numbers of ranks together


def measure(ranks: list[int] | None = None, precisions: list[str] | None = None) -> Machine:
    """Measure with each of these numbers of ranks at the same time, and return this machine as one node.

    Args:
        ranks: None: on CPUs 1, 2 and 4; on GPUs one, and all.
        precisions: dtypes of matrix products; None: float32, and on GPUs bfloat16 too.

    Raises:
        UserError: there are fewer GPUs than ranks, a dtype is not known, or two minutes did not suffice.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = sorted(set(ranks or ([1, gpus] if gpus else [1, 2, 4])))
    precisions = precisions or (["float32", "bfloat16"] if gpus else ["float32"])
    if ranks[0] < 1 or (gpus and ranks[-1] > gpus):
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: give numbers from 1 to {gpus or 'that of the ranks'}")
    for name in precisions:
        if name not in PRODUCTS:
            raise UserError(f"--dtypes {name} is not known: known are {', '.join(PRODUCTS)}")
    end = time.monotonic() + LIMIT_S
    found = {count: _rates(count, precisions, end) for count in ranks}
    facts = describe_environment()
    memory = torch.cuda.get_device_properties(0).total_memory - ASSUMED.reserved if gpus else None
    return Machine(
        name=torch.cuda.get_device_name(0) if gpus else f"{facts['processor']}, {available_cores()} cores",
        device="cuda" if gpus else "cpu",
        per_node=gpus or ranks[-1],
        memory=memory,
        ranks=found,
    )


def _rates(count: int, precisions: list[str], end: float) -> Rates:
    """Measure with ``count`` ranks, which end before ``end`` (of `time.monotonic`)."""
    threads = str(max(1, available_cores() // count))  # as a training's launcher does
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"DEEPSPEED_LOG_LEVEL": "error", "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rates.json")
        command = [sys.executable, "-m", "shodh_moe.plan.measure_rank", str(result), *precisions]
        log = Path(folder, "log")
        with open(log, "w") as output:
            started = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                )
                for rank in range(count)
            ]
        try:
            codes = [one.wait(timeout=max(1.0, end - time.monotonic())) for one in started]
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--measure with {count} ranks did not end within {LIMIT_S:g} s in all: measure while the machine is "
                "idle, or fewer numbers of ranks with --ranks"
            ) from None
        finally:
            for one in started:
                one.kill()
                one.wait()
        if any(codes):
            raise RuntimeError(f"a rank of --measure failed:\n{log.read_text(errors='replace')[-2000:]}")
        return Rates.model_validate_json(result.read_text())
