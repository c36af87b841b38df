"""The registry of trackers. To add a tracker, add a file in trackers/ and a line here.

Classes are named rather than imported, so that reading a config needs none of their libraries.
"""

from __future__ import annotations

from shodh_moe.config.routers import check_name

# Value in telemetry.trackers -> class, which implements `trackers.tracker.Tracker`.
TRACKERS = {
    "csv": "shodh_moe.trackers.csv_file:CsvFile",
    "mlflow": "shodh_moe.trackers.mlflow:MLflow",
    "tensorboard": "shodh_moe.trackers.tensorboard:TensorBoard",
    "wandb": "shodh_moe.trackers.wandb:WandB",
}
# Those that write files of the run folder. The training itself writes them; each of the others has a process.
LOCAL = ("csv", "tensorboard")


def check_tracker(name: object) -> object:
    """Return ``name`` if a tracker of this name is registered; otherwise raise pydantic's error for a wrong literal."""
    return check_name(name, TRACKERS)
