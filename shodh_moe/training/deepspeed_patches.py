"""Workarounds that depend on DeepSpeed's internals: how it finds experts, handles float64, and compiles operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn

from shodh_moe.parallel import ExpertParallel, Layout


class ExpertParallelMarker(DeepSpeedMoE):
    """A module that makes DeepSpeed treat our expert parameters as experts.

    The engine looks for instances of its own MoE class, then calls ``set_deepspeed_parallelism`` on every module that
    has it, before it broadcasts parameters. This module without parameters provides both, so the model itself does not
    depend on DeepSpeed.
    """

    def __init__(self, num_experts: int, ep: ExpertParallel, layout: Layout):
        nn.Module.__init__(self)  # DeepSpeed's own constructor would build its layer
        self.num_experts = num_experts
        self._ep, self._layout = ep, layout

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        name = group_name(self._layout)
        if name not in groups._EXPERT_PARALLEL_GROUP:
            # DeepSpeed's own function puts consecutive ranks into an EP group, but those may have slabs of one sample.
            replicas, sharing = self._layout.replica_groups(), self._layout.expert_groups()
            groups._EXPERT_DATA_PARALLEL_GROUP[name], _ = dist.new_subgroups_by_enumeration(replicas)
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = _own(replicas)
            groups._EXPERT_PARALLEL_GROUP[name], _ = dist.new_subgroups_by_enumeration(sharing)
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = _own(sharing)
        self._ep.group = groups._get_expert_parallel_group(name)


def group_name(layout: Layout) -> str:
    """DeepSpeed's name for the groups of ranks that share or repeat experts. It reads EP from the third word."""
    return f"ep_size_{layout.ep}" + (f"_context_{layout.cp}" if layout.cp > 1 else "")


def _own(ranks_of_groups: list[list[int]]) -> list[int]:
    return next(ranks for ranks in ranks_of_groups if dist.get_rank() in ranks)


@contextmanager
def in_float64(zero: bool) -> Iterator[None]:
    """Within the block, let DeepSpeed keep a float64 model in float64; everything is restored afterwards.

    By itself DeepSpeed refuses to reduce float64 gradients, and ZeRO keeps master weights and gradients in float32. It
    asks for the supported types at every reduction, not only while it initialises.

    Args:
        zero: whether the engine uses ZeRO.
    """
    f64 = torch.float64
    with ExitStack() as changes:
        types = [torch.float32, torch.bfloat16, torch.float16, f64]
        changes.enter_context(_replaced(get_accelerator(), "supported_dtypes", lambda: types))
        if zero:
            changes.enter_context(_replaced(DeepSpeedEngine, "get_data_types", lambda self: (f64, f64)))
            changes.enter_context(_replaced(ZeROOptimizer, "_configure_master_weights", lambda self, **settings: f64))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class or object within the block."""
    own = vars(owner).get(name)  # None if it is inherited, or belongs to the object's class
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def without_shared_memory_operation() -> Iterator[None]:
    """Within the block, keep DeepSpeed from compiling its shared-memory operation, which only inference uses.

    Compiling takes a minute or two at the first start, and fails without a C++ compiler. DeepSpeed looks the operation
    up only while it initialises its communication.
    """
    operations, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    compatible = operations.get(name)
    operations[name] = False
    try:
        yield
    finally:
        operations[name] = compatible
