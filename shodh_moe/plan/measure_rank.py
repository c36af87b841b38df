"""The program of one rank of ``shodh plan --measure``. Arguments: the file for rank 0's result, and the dtypes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from shodh_moe.base.files import write_text
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.plan.microbenchmarks import measure_rates
from shodh_moe.training.process_group import init_distributed, leave_process_group


def main(result: str, *precisions: str) -> None:
    """Measure together with the other ranks, whose number and meeting point the environment states."""
    keep_freed_memory()  # as a rank of a training does
    torch.use_deterministic_algorithms(True, warn_only=True)
    rank, cuda = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    init_distributed()
    rates = measure_rates(device, precisions)
    if rank == 0:
        write_text(Path(result), rates.model_dump_json())
    dist.barrier()
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
