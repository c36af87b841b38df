"""What a tracker has to implement, what it is given, and how one is made from its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.config import TelemetryConfig
from shodh_moe.config.trackers import LOCAL, TRACKERS

LIBRARIES = {"mlflow": "MLflow", "wandb": "W&B's library"}  # by tracker, which is also the name of module and extra


@dataclass(frozen=True)
class TrackedRun:
    """A run that is tracked.

    Attributes:
        folder: the run folder.
        telemetry: the section of its config.
        step: the training's step when it starts or resumes; 0 for a new one.
        kept: the records up to that step.
    """

    folder: Path
    telemetry: TelemetryConfig
    step: int = 0
    kept: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def own_folder(self) -> Path:
        """The folder in which trackers keep their files."""
        return self.folder / "trackers"


Point = tuple[int, Mapping[str, float]]  # a step and its numbers by name


class Tracker(Protocol):
    """Where records go. A tracker is made from a `TrackedRun`, and may raise any error in any call."""

    def add(self, points: Sequence[Point]) -> None:
        """Add the numbers of records, in the order of their steps."""

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Add pictures, RGB uint8 [height, width, 3], by name."""

    def add_report(self, results: Point, files: list[Path]) -> None:
        """Add the numbers of an evaluation and the files of the report."""

    def close(self, finished: bool = True) -> None:
        """Write what is left. ``finished`` says whether the training has come to its end."""


def make_tracker(name: str, run: TrackedRun) -> Tracker:
    """Make the tracker that is registered as ``name``.

    Raises:
        UserError: its library is not installed.
        Exception: whatever its library raises, for example without a connection.
    """
    require_library(name)
    module, _, cls = TRACKERS[name].partition(":")
    tracker: Tracker = getattr(import_module(module), cls)(run)
    return tracker


def require_library(name: str) -> None:
    """Raise `UserError` unless the library of a tracker is installed."""
    if name not in LOCAL:
        from importlib.util import find_spec

        if find_spec(name) is None:
            raise UserError(
                f"telemetry.trackers: {name} needs {LIBRARIES[name]}: pip install 'shodh_moe[{name}]', or leave it out"
            )
