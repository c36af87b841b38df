"""The layers that the MoE benchmarks compare: ours, DeepSpeed's, and a dense network."""

from __future__ import annotations

import os
from typing import Any

import torch

from support.peers import deepspeed
from support.timing import Missing, first_line

CAPACITY_FACTOR = 1.25
MIN_CAPACITY = 4


def our_layer(width: int, hidden: int, experts: int, router: str, dropless: bool = False, ep: Any = None) -> Any:
    """`shodh_moe.model.MoE` with the experts of ``ep`` (None: all experts), or the reason why it cannot be made."""
    try:
        from shodh_moe.config import MoEConfig, RouterConfig
        from shodh_moe.model.moe import MoE
        from shodh_moe.parallel import ExpertParallel
    except ImportError as error:
        return Missing(first_line(error))
    config = MoEConfig(
        num_experts=experts,
        expert_hidden=hidden,
        shared_experts=0,
        dropless=dropless,
        capacity_factor=CAPACITY_FACTOR,
        min_capacity=MIN_CAPACITY,
        router=RouterConfig(kind=router),
    )
    return MoE(width, config, ep or ExpertParallel(), seed=0, layer=0)


def feed_forward(width: int, hidden: int) -> Any:
    """One SwiGLU network, or the reason why it cannot be made (unlike the kernels, the model needs pydantic)."""
    try:
        from shodh_moe.model.experts import FeedForward
    except ImportError as error:
        return Missing(first_line(error))
    return FeedForward(width, hidden)


def deepspeed_layer(width: int, hidden: int, experts: int, factor: float, random_tokens: bool, device: Any) -> Any:
    """`deepspeed.moe.layer.MoE` in a world of one process, or the reason why it cannot be made."""
    if isinstance(found := deepspeed(), Missing):
        return found
    if isinstance(expert := feed_forward(width, hidden), Missing):
        return expert
    try:
        import deepspeed as ds
        from deepspeed.moe.layer import MoE

        if not torch.distributed.is_initialized():
            one_rank = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
            }
            os.environ.update(one_rank)
            # Otherwise DeepSpeed spends a minute or more compiling an operation that only inference uses.
            ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            backend = "nccl" if device.type == "cuda" else "gloo"
            ds.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        layer = MoE(
            width, expert, experts, ep_size=1, k=1, capacity_factor=factor,
            min_capacity=MIN_CAPACITY, use_rts=random_tokens,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()
        return layer
    except Exception as error:
        return Missing(first_line(error))
