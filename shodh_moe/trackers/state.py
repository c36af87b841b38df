"""What a run folder keeps of a tracked run, in ``trackers/<name>.json``: its identity, and the last steps sent.

A run that is resumed is thereby the same tracked run, and each of its steps is sent once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.trackers.tracker import TrackedRun


@dataclass
class TrackerState:
    """What is known of a run in one tracker.

    Attributes:
        path: the file.
        where: the server and project that hold the tracked run.
        id: its identity there; "" if there is none yet.
        sent: the last step sent, by kind of record.
    """

    path: Path
    where: str = ""
    id: str = ""
    sent: dict[str, int] = field(default_factory=dict)

    def is_new(self, record: dict[str, Any]) -> bool:
        """Whether the tracker lacks a record."""
        return int(record["step"]) > self.sent.get(record["kind"], -1)

    def mark_sent(self, records: Iterable[dict[str, Any]]) -> None:
        """Remember that the tracker has these records."""
        for record in records:
            self.sent[record["kind"]] = max(record["step"], self.sent.get(record["kind"], -1))
        self.save()

    def begin(self, where: str, id: str) -> None:
        """Remember a new tracked run, to which nothing has been sent."""
        self.where, self.id, self.sent = where, id, {}
        self.save()

    def save(self) -> None:
        """Write the file. Raises: UserError: it cannot be written."""
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text(self.path, json.dumps(content) + "\n")


def load_state(run: TrackedRun, tracker: str) -> TrackerState:
    """Read what is known of a run in a tracker.

    Raises:
        UserError: the file is damaged.
    """
    path = run.own_folder / f"{tracker}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return TrackerState(path, found["where"], found["id"], found["sent"])
    except FileNotFoundError:
        return TrackerState(path)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and the run is tracked anew") from None
