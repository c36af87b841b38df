"""Ending early and in good order: a signal asks for it, and all ranks stop after the same step.

Schedulers send SIGTERM, or SIGUSR1 some time before the limit, to some ranks or to all. Each notes it; the ranks learn
of each other's with the gradient norms of the step, write a checkpoint, and end with `EXIT_REQUEUE`.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this process has been asked to stop. A context, within which the two signals do nothing else."""

    def __enter__(self) -> StopRequest:
        self._asked = False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
