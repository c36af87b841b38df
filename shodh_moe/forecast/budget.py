"""Training by wall time: how much of it is spent, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WARM_UP = 0.05  # share of the time
LEAST = 0.01  # of the highest learning rate, at the end


class TimeBudget:
    """Wall time that starts when this is made.

    Args:
        seconds: the time.
        clock: a clock in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter):
        self._seconds, self._clock, self._began = seconds, clock, clock()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def share(self) -> float:
        """The spent share of the time; 1 and more when it is over."""
        return self.spent / self._seconds


def learning_rate(share: float, highest: float) -> float:
    """Linear warm-up over `WARM_UP` of the time, then a cosine down to `LEAST` of the highest rate."""
    if share < WARM_UP:
        return highest * max(share / WARM_UP, LEAST)
    rest = min((share - WARM_UP) / (1 - WARM_UP), 1.0)
    return highest * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * rest)))
