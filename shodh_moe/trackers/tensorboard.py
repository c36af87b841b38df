"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import image as image_summary

from shodh_moe.trackers.event_file import EventFile
from shodh_moe.trackers.tracker import Point, TrackedRun


class TensorBoard:
    """Writes ``tensorboard/``. TensorBoard discards what earlier files hold for the steps after a resumed one.

    Raises:
        UserError: here and in every call, if the disk is full or not writable.
    """

    def __init__(self, run: TrackedRun):
        self._events = EventFile(run.folder / "tensorboard", purge_step=run.step + 1 if run.step else 0)

    def add(self, points: Sequence[Point]) -> None:
        for step, scalars in points:
            # One event for all scalars: one add_scalar call each would cost ten times as much.
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            self._events.add(Summary(value=values), step)

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        for name, image in images.items():
            self._events.add(image_summary(name, image, dataformats="HWC"), step)

    def add_report(self, results: Point, files: list[Path]) -> None:
        """Add nothing: the report is beside the event files."""

    def close(self, finished: bool = True) -> None:
        """Do nothing: every event is written at once."""
