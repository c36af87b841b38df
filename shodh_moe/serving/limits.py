"""What a service accepts, and the errors that a client sees."""

from __future__ import annotations

from dataclasses import dataclass

from shodh_moe.base.text import printable


@dataclass(frozen=True)
class Limits:
    """Bounds of one service.

    Attributes:
        body_bytes: largest body of a request, also unpacked.
        steps: largest number of snapshots to predict.
        seconds: time for a request's body to arrive, and for its forecast.
        waiting: number of requests that the service holds at a time, from their first byte to their answer.
        batch: largest number of requests that are computed together.
    """

    body_bytes: int = 256 * 2**20
    steps: int = 100
    seconds: float = 120.0
    waiting: int = 16
    batch: int = 4


class Refused(Exception):
    """A request that cannot be answered: an HTTP status from 400 on, and the reason in one printable line."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, printable(reason)
        super().__init__(self.reason)
