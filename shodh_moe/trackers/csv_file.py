"""A CSV file in the run folder with a row per number: ``step,name,value``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shodh_moe.base.files import append, write_text
from shodh_moe.trackers.scalars import scalars_of
from shodh_moe.trackers.tracker import Point, TrackedRun

CSV = "metrics.csv"


class CsvFile:
    """Writes ``metrics.csv``. At the start it is written anew from the records that a resumed run keeps.

    Raises:
        UserError: here and in every call, if the disk is full or not writable.
    """

    def __init__(self, run: TrackedRun):
        self.path = run.folder / CSV
        kept = [(record["step"], scalars_of(record)) for record in run.kept]
        write_text(self.path, "step,name,value\n" + _rows(kept))

    def add(self, points: Sequence[Point]) -> None:
        append(self.path, _rows(points).encode())

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Add nothing: a CSV file holds no pictures."""

    def add_report(self, results: Point, files: list[Path]) -> None:
        """Add nothing: metrics.json holds the results."""

    def close(self, finished: bool = True) -> None:
        """Do nothing: every row is written at once."""


def _rows(points: Sequence[Point]) -> str:
    # Names consist of words, slashes and points, so they need no quotes.
    return "".join(f"{step},{name},{value!r}\n" for step, scalars in points for name, value in scalars.items())
