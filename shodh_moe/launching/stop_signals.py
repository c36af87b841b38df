"""Stop signals: after SIGTERM or SIGUSR1, all ranks stop cleanly after the same step.

Schedulers send SIGTERM, or SIGUSR1 some time before the time limit, to some or all ranks. Each rank records its signal.
The ranks exchange these requests together with the gradient norms of the step, write a checkpoint, and end with
`EXIT_REQUEUE`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def on_stop_signals(act: Callable[[], object]) -> Iterator[None]:
    """Within the block, the two signals call ``act`` and have no other effect."""
    before = {number: signal.signal(number, lambda *_: act()) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_request() -> Iterator[list[bool]]:
    """Yield a list that is empty until this process is asked to stop."""
    asked: list[bool] = []
    with on_stop_signals(lambda: asked.append(True)):
        yield asked
