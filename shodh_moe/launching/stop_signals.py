"""Ending early and in good order: a signal asks for it, and all ranks stop after the same step.

Schedulers send SIGTERM, or SIGUSR1 some time before the limit, to some ranks or to all. Each notes it; the ranks learn
of each other's with the gradient norms of the step, write a checkpoint, and end with `EXIT_REQUEUE`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def on_stop_signals(act: Callable[[], object]) -> Iterator[None]:
    """Within the block the two signals call ``act`` and do nothing else."""
    before = {number: signal.signal(number, lambda *_: act()) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_request() -> Iterator[list[bool]]:
    """A list that is empty until this process is asked to stop."""
    asked: list[bool] = []
    with on_stop_signals(lambda: asked.append(True)):
        yield asked
