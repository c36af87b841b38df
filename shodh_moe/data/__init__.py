"""Generate flow data, store it in the_well's HDF5 schema, read it with checks, and sample it for training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shodh_moe.data.dataset import Dataset, Fields, open_dataset
    from shodh_moe.data.generation import generate, is_complete
    from shodh_moe.data.listing import SPLITS, TrajectoryKey, domain_names, list_trajectories, trajectories_by_source
    from shodh_moe.data.loader import Snapshots, mixed_batches, read_batches
    from shodh_moe.data.reading import (
        Trajectory,
        TrajectoryRecord,
        open_trajectories,
        read_provenance,
        read_snapshots,
        read_trajectory,
    )
    from shodh_moe.data.stats import FieldStats, compute_stats, write_stats
    from shodh_moe.data.trainable import require_trainable
    from shodh_moe.data.well import write_trajectory

__all__ = [
    "SPLITS",
    "Dataset",
    "FieldStats",
    "Fields",
    "Snapshots",
    "Trajectory",
    "TrajectoryKey",
    "TrajectoryRecord",
    "compute_stats",
    "domain_names",
    "generate",
    "is_complete",
    "list_trajectories",
    "mixed_batches",
    "open_dataset",
    "open_trajectories",
    "read_batches",
    "read_provenance",
    "read_snapshots",
    "read_trajectory",
    "require_trainable",
    "trajectories_by_source",
    "write_stats",
    "write_trajectory",
]

_NAMES = {
    "dataset": ("Dataset", "Fields", "open_dataset"),
    "generation": ("generate", "is_complete"),
    "listing": ("SPLITS", "TrajectoryKey", "domain_names", "list_trajectories", "trajectories_by_source"),
    "loader": ("Snapshots", "mixed_batches", "read_batches"),
    "reading": (
        *("Trajectory", "TrajectoryRecord", "open_trajectories", "read_provenance", "read_snapshots"),
        "read_trajectory",
    ),
    "stats": ("FieldStats", "compute_stats", "write_stats"),
    "trainable": ("require_trainable",),
    "well": ("write_trajectory",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported on demand: to read data needs neither the solvers nor numba, which takes a second to load.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
