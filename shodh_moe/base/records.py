"""Read the records that a training appended to its ``metrics.jsonl`` (docs/telemetry.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError

METRICS = "metrics.jsonl"  # name in a run folder and in a tokenizer's folder
Record = dict[str, Any]


def read_history(path: Path) -> list[Record]:
    """Read all records in file order. A truncated last line, which a killed run leaves behind, is ignored.

    Raises:
        UserError: another line is not JSON (names the line).
        FileNotFoundError: there is no such file.
    """
    found: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON ({error}): repair or remove that line") from error
    return found


def read_run(run: Path, kind: str = "") -> list[Record]:
    """Read a run's records as `read_history` does; [] if it has none yet.

    Args:
        kind: ``train`` or ``valid`` selects the records of that kind, as `records` does.
    """
    path = run / METRICS
    history = read_history(path) if path.exists() else []
    return records(history, kind) if kind else history


def records(history: Iterable[Record], kind: str) -> list[Record]:
    """Select the records of one kind, sorted by step. If a resumed run has repeated a step, its later record counts."""
    by_step = {record["step"]: record for record in history if record.get("kind") == kind and "step" in record}
    return [by_step[step] for step in sorted(by_step)]


class Tail:
    """Reads the records that are appended to a file. A resumed run replaces the file, which is then read anew."""

    def __init__(self, path: Path):
        self.path, self._inode, self._offset = path, -1, 0

    def read(self) -> list[Record]:
        """Return the complete records since the last call; [] if there is no file.

        Raises:
            UserError: a line is not JSON.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines() if line.strip()]
        except ValueError as error:
            raise UserError(f"{self.path} has a line that is not JSON ({error}): repair or remove it") from None
        self._offset += len(whole)
        return records
