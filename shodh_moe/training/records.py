"""The records that a training appended to its ``metrics.jsonl`` (docs/telemetry.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError

Record = dict[str, Any]


def read_history(path: Path) -> list[Record]:
    """All records in the order of the file; half a last line, which a killed run leaves, is not one.

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
            raise UserError(f"{path} line {number} is not JSON ({error}): mend or remove that line") from error
    return found


def records(history: Iterable[Record], kind: str) -> list[Record]:
    """The records of one kind by step; where a resumed run wrote a step twice, the later one counts."""
    by_step = {record["step"]: record for record in history if record.get("kind") == kind and "step" in record}
    return [by_step[step] for step in sorted(by_step)]
