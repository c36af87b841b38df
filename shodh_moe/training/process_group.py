"""Join and leave the process group of a training's ranks."""

from __future__ import annotations

import os
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch.distributed.distributed_c10d import _abort_process_group

from shodh_moe.launching.rank_variables import set_rank_variables
from shodh_moe.parallel.rendezvous import join
from shodh_moe.training.deepspeed_patches import without_shared_memory_operation

START_SECONDS = 300.0  # maximum time between the first and last rank's start: imports from a shared disk can be slow


def init_distributed(facts: dict[str, Any] | None = None) -> None:
    """Join the process group that the launcher's variables describe (collective). A single process makes its own.

    For the rest of the process this silences torch's deprecation warning about ``all_gather_into_tensor``, which ZeRO
    would cause at every step.

    Args:
        facts: values that must be equal on every rank, by name.

    Raises:
        UserError: ranks differ in their facts, world size or library versions, or one is missing.
    """
    set_rank_variables()
    backend = "nccl" if os.environ.get("DS_ACCELERATOR") == "cuda" else "gloo"
    if backend == "nccl":  # before there is an engine, ranks exchange tensors on their own GPUs too
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join(backend, facts or {}, START_SECONDS)
    with without_shared_memory_operation():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # DeepSpeed calls a function that torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)


def leave_process_group(failed: bool = False) -> None:
    """Destroy the process groups of this process, including those that DeepSpeed stores.

    Args:
        failed: whether this rank ends with an error. NCCL is then aborted, because it may be waiting for a collective
            that the other ranks never join.
    """
    if failed and dist.get_backend() == "nccl":
        _abort_process_group()
        groups._release_process_group_references(group=None)
    elif deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()
