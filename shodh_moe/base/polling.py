"""Polling for a condition that sends no notification, such as another process's file or key."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether ``condition`` became true within ``seconds``. The polling interval grows from 1 ms to 0.2 s."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return True
