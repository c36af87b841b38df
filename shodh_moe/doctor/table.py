"""Format the results of ``shodh doctor`` as a table or as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]
COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "error": "\033[31m"}


@dataclass(frozen=True)
class Line:
    """The result of one check. An error means that training cannot run. Every status except ok has a remedy."""

    status: Status
    what: str
    value: str
    remedy: str = ""


def as_text(lines: list[Line], width: int = 120, colours: bool = False) -> str:
    """Format the lines in aligned columns of status, what and value, with each remedy below its value."""
    first, second = max(map(len, COLOURS)) + 2, max((len(line.what) for line in lines), default=0) + 2
    rows = []
    for line in lines:
        text = textwrap.wrap(" ".join(line.value.split()), max(width - first - second, 40)) or [""]
        if line.remedy:  # not wrapped, so that commands can be copied
            text.append(f"-> {line.remedy}")
        status = line.status.ljust(first)
        rows.append(
            (f"{COLOURS[line.status]}{status}\033[0m" if colours else status) + line.what.ljust(second) + text[0]
        )
        rows += [" " * (first + second) + more for more in text[1:]]
    return "\n".join([*rows, "", summary(lines)])


def summary(lines: list[Line]) -> str:
    """Count the problems, as in ``1 error, 2 warnings``."""
    parts = []
    for status in ("error", "warning"):
        if count := sum(line.status == status for line in lines):
            parts.append(f"{count} {status}{'s' if count > 1 else ''}")
    return ", ".join(parts) or "all is well"


def as_json(lines: list[Line]) -> str:
    counts = {f"{status}s": sum(line.status == status for line in lines) for status in ("error", "warning")}
    return json.dumps({**counts, "lines": [asdict(line) for line in lines]}, indent=2)
