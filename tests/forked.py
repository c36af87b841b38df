"""Processes that start fast: each is forked from a server that has already imported torch and DeepSpeed.

Importing them takes longer than most of what the tests' ranks do. The server is started on first use, once per pytest
process, and runs nothing but imports. Like ranks on a CPU, it uses one thread.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import torch.multiprocessing

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
IMPORTS = ["torch.distributed", "deepspeed", "shodh_moe.runs.pretrain_rank", "shodh_moe.training.pretrain"]
IMPORTS += ["shodh_moe.training.tokenizer_task", "shodh_moe.parallel.rendezvous", "safetensors.torch", "pytest"]


def context() -> ForkServerContext:
    """Return a multiprocessing context that forks its processes from the server."""
    with mock.patch.dict(os.environ, ENVIRONMENT):  # DeepSpeed reads it when it is imported
        found = multiprocessing.get_context("forkserver")
        found.set_forkserver_preload(IMPORTS)
        forkserver.ensure_running()
    return found


def spawn(worker: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Run ``worker(rank, *arguments)`` on every rank; raise the error of a rank that fails."""
    context()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=ranks, start_method="forkserver")
