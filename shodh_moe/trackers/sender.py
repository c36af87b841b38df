"""Feed records to a tracker: their numbers at once, and load maps every few records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from shodh_moe.trackers.load_maps import LoadMaps
from shodh_moe.trackers.scalars import scalars_of
from shodh_moe.trackers.tracker import Tracker

RECORDS_PER_MAP = 20  # maps are drawn after this many routing records, and at the end


class Sender:
    """Gives records to a tracker."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self._maps, self._records, self._step = LoadMaps(), 0, 0

    def know(self, records: Iterable[dict[str, Any]]) -> None:
        """Take records that the tracker already has, which only the load maps need."""
        for record in records:
            if record.get("routing"):
                self._maps.add(record["routing"])

    def send(self, records: Sequence[dict[str, Any]]) -> None:
        """Give records to the tracker. Raises whatever the tracker raises."""
        self.tracker.add([(record["step"], scalars_of(record)) for record in records])
        drawn = self._records // RECORDS_PER_MAP
        for record in records:
            if record.get("routing"):
                self._maps.add(record["routing"])
                self._step, self._records = record["step"], self._records + 1
        if self._records // RECORDS_PER_MAP > drawn:
            self._draw()

    def draw_last(self) -> None:
        """Draw the load maps, unless the last record has drawn them."""
        if self._records % RECORDS_PER_MAP:
            self._draw()

    def _draw(self) -> None:
        named = {f"routing_load_map/{name}": image for name, image in self._maps.images().items()}
        self.tracker.add_images(named, self._step)
