"""Write TensorBoard event files synchronously: its own writers use a thread, in which a full disk goes unnoticed."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import append, disk_trouble


class EventFile:
    """A new event file in a folder.

    Args:
        purge_step: makes TensorBoard discard what earlier files in the folder hold for this and later steps; 0 keeps
            everything.

    Raises:
        UserError: here and in `add`, if the disk is full or not writable.
    """

    def __init__(self, folder: Path, purge_step: int = 0):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if reason := disk_trouble(error):
                raise UserError(f"cannot write {folder}: {reason}") from error
            raise
        # TensorBoard reads the files in name order.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"{name}.{len(list(folder.iterdir()))}"
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, summary: Summary, step: int) -> None:
        """Write the scalars or images of one step."""
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self.path, record.getvalue())
