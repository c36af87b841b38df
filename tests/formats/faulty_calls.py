"""What a library may do on a damaged file, for the worker process; importing this is fast."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(path: Path) -> None:
    time.sleep(600)


def fail(path: Path) -> None:
    raise RuntimeError(f"no table in {path.name}")


def size(path: Path, factor: int) -> int:
    return factor * path.stat().st_size
