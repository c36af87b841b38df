"""Stop signals: after SIGTERM, SIGUSR1 or SIGHUP, all ranks stop cleanly after the same step.

Schedulers send SIGTERM, or SIGUSR1 some time before the time limit, to some or all ranks. A terminal that closes sends
SIGHUP, which nohup makes its command ignore. Each rank records its signal.
The ranks exchange these requests together with the gradient norms of the step, write a checkpoint, and end with
`EXIT_REQUEUE`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask this process to stop: SIGHUP only if it is not ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGUSR1, *hangup]


@contextmanager
def on_stop_signals(act: Callable[[], object]) -> Iterator[None]:
    """Within the block, the stop signals call ``act`` and have no other effect.

    SIGHUP after another signal is ignored: both a shell and the kernel send it when a terminal closes, and systemd
    sends it after SIGTERM. So it never means that the user insists.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP or not came:
            came.append(number)
            act()

    before = {number: signal.signal(number, handle) for number in stop_signals()}
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
