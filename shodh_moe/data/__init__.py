"""Generate flow data, store it in the_well's HDF5 schema, read it with checks, and sample it for training."""

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
    "FieldStats",
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
