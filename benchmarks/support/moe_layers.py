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
        scope="layer",
        num_experts=experts,
        expert_hidden=hidden,
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


def expert_products(width: int, hidden: int, experts: int, rows: int, batched: bool, device: Any, dtype: Any) -> Any:
    """A call that makes only the six products of SwiGLU experts, forward and backward, with ``rows`` rows each.

    A layer makes the same products, and routes and moves tokens besides.

    Args:
        batched: one batched product for all experts instead of one product for each.
    """
    x_ETD, dy_ETD = (torch.randn(experts, rows, width, device=device).to(dtype) for _ in range(2))
    hidden_ETF, product_ETF = (torch.randn(experts, rows, n * hidden, device=device).to(dtype) for n in (2, 1))
    gate_up_EDF = torch.randn(experts, width, 2 * hidden, device=device).to(dtype)
    down_EFD = torch.randn(experts, hidden, width, device=device).to(dtype)
    pairs = [
        (x_ETD, gate_up_EDF), (product_ETF, down_EFD), (dy_ETD, down_EFD.transpose(1, 2)),
        (product_ETF.transpose(1, 2), dy_ETD), (x_ETD.transpose(1, 2), hidden_ETF),
        (hidden_ETF, gate_up_EDF.transpose(1, 2)),
    ]  # fmt: skip
    outputs = [torch.bmm(*pair) for pair in pairs]

    def call(_: Any) -> tuple[Any, ...]:
        for (a, b), out in zip(pairs, outputs, strict=True):
            if batched:
                torch.bmm(a, b, out=out)
            else:
                for one, other, place in zip(a, b, out, strict=True):
                    torch.mm(one, other, out=place)
        return tuple(outputs)

    return call


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
