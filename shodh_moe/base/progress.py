"""Progress of long loops: a bar in a terminal, occasional plain lines in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_LINE_EVERY_SECONDS = 10.0


def progress(iterable: Iterable[Item], desc: str, total: int | None = None) -> Iterator[Item]:
    """Yield from ``iterable`` and report progress and remaining time on stderr.

    A terminal gets a tqdm bar. Anything else (a log, SLURM) gets a line at most every 10 seconds, and one at the end.
    ``total`` defaults to ``len(iterable)`` if it has one.
    """
    if total is None:
        try:
            total = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            total = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        # tqdm would print empty lines on a terminal that reports 0 columns and rows.
        size = shutil.get_terminal_size((100, 24))
        yield from tqdm(iterable, desc=desc, total=total, file=sys.stderr, ncols=size.columns, nrows=size.lines)
        return
    started = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if done != total and now - last >= _LINE_EVERY_SECONDS:
            last = now
            each = (now - started) / done
            left = f", about {_clock(each * (total - done))} left" if total else ""
            print(f"{desc}: {done}/{total or '?'}, {_rate(each)}{left}", file=sys.stderr, flush=True)
    print(f"{desc}: {done}/{total or done} in {_clock(time.monotonic() - started)}", file=sys.stderr, flush=True)


def _rate(each: float) -> str:
    """Format a rate per second, minute or hour, whichever gives at least one, from the seconds ``each`` item takes."""
    unit, name = (1, "second") if each <= 1 else (60, "minute") if each <= 60 else (3600, "hour")
    return f"{unit / max(each, 1e-9):.3g} a {name}"


def _clock(seconds: float) -> str:
    """Format a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
