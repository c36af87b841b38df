"""Write ``metrics.jsonl`` on rank 0, and give its records to the trackers (docs/telemetry.md, docs/trackers.md)."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import append, finite_json, write_text
from shodh_moe.base.records import METRICS, Record, read_run
from shodh_moe.config import TelemetryConfig
from shodh_moe.config.trackers import LOCAL, with_process
from shodh_moe.trackers.follower_process import FollowerProcess
from shodh_moe.trackers.sender import Sender
from shodh_moe.trackers.tracker import TrackedRun, make_tracker


class Log:
    """Appends records to ``metrics.jsonl`` and gives them to trackers. A context manager that closes itself.

    TensorBoard and the CSV file are written here. Every other tracker has a process that reads ``metrics.jsonl``.

    Args:
        step: the step that the run resumes from; later records are removed.
        telemetry: names the trackers; its default is TensorBoard.

    Raises:
        UserError: here and at every write, if the disk is full or not writable. No file is left with half a record.
    """

    def __init__(self, folder: Path, step: int, telemetry: TelemetryConfig | None = None):
        telemetry = telemetry or TelemetryConfig()
        self.path, self.closed = folder / METRICS, False
        kept = [record for record in read_run(folder) if record["step"] <= step] if step else []
        # Written as a whole: on a full disk the records of a resumed run must not be lost.
        write_text(self.path, "".join(map(_line, kept)))
        run = TrackedRun(folder, telemetry, step, kept)
        names = list(dict.fromkeys(telemetry.trackers))
        self._senders = [Sender(make_tracker(name, run)) for name in names if name in LOCAL]
        for sender in self._senders:
            sender.know(kept)
        self._followers = [FollowerProcess(name, run) for name in with_process(names)]

    def write(self, record: dict[str, Any]) -> None:
        """Write one record with ``step`` and ``kind``.

        Numbers that are not finite become null, because JSON cannot represent them.
        """
        if self.closed:
            raise ValueError(f"the log {self.path} is closed")
        record = finite_json(record)
        append(self.path, _line(record).encode())
        for sender in self._senders:
            sender.send([record])

    def close(self, finished: bool = True) -> None:
        """Draw the load maps a last time, and let the trackers end. `write` raises ValueError from then on.

        This does not wait for the processes of trackers, because a signal may leave the training little time.

        Args:
            finished: whether the training has come to its end.
        """
        if self.closed:
            return
        self.closed = True
        try:
            for sender in self._senders:
                sender.draw_last()
                sender.tracker.close(finished)
        finally:
            for follower in self._followers:
                follower.end(finished)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # After an error, such as a full disk, a second one of the same kind must not hide it.
        with suppress(UserError) if error else nullcontext():
            self.close(error is None)


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
