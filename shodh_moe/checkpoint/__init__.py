"""Checkpoints: complete, atomic, portable between layouts, written while training continues (DESIGN 8).

`CheckpointWriter` writes them from all ranks, `find_checkpoint` chooses one, and `CheckpointReader` and `load_weights`
read it at any expert-parallel size and ZeRO stage. ``shodh_moe.checkpoint.inspect`` prints what a checkpoint holds.
"""

from shodh_moe.checkpoint.find import checkpoints_at, resolve_checkpoint
from shodh_moe.checkpoint.fragments import Fragment, logical_shape, model_fragments, runs
from shodh_moe.checkpoint.read import (
    CheckpointReader,
    damage,
    damages,
    find_checkpoint,
    last_checkpoint,
    list_checkpoints,
    load_weights,
    mismatch,
)
from shodh_moe.checkpoint.state import Damaged
from shodh_moe.checkpoint.write import CheckpointWriter

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "Damaged",
    "Fragment",
    "checkpoints_at",
    "damage",
    "damages",
    "find_checkpoint",
    "last_checkpoint",
    "list_checkpoints",
    "load_weights",
    "logical_shape",
    "mismatch",
    "model_fragments",
    "resolve_checkpoint",
    "runs",
]
