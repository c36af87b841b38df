"""Sums of a rank between two train records. Checkpoints keep them, so that stopping does not change the records."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = "interval/numbers"
LOSS = "interval/loss/"


class Interval:
    """Losses and times since the last train record.

    Attributes:
        sums: sum of each loss over the micro-batches of applied steps, 0-d tensors by name.
        micro_batches: number of micro-batches in ``sums``.
        times: duration of each applied step that this process made, in seconds; checkpoints do not keep it.
        skipped: number of steps that were not applied since the run began.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.clear()

    def clear(self) -> None:
        """Start over after a record."""
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.times: list[float] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one micro-batch, 0-d tensors by name."""
        for key, value in losses.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.micro_batches += 1

    def means(self) -> Tensor:
        """Return the mean losses in the order of ``sums``, float64 [losses]."""
        return torch.stack([value.double() for value in self.sums.values()]) / self.micro_batches

    def state(self) -> dict[str, Tensor]:
        """Return everything except the times, as 1-D tensors."""
        sums = {LOSS + name: value.view(1) for name, value in self.sums.items()}
        return {NUMBERS: torch.tensor([self.skipped, self.micro_batches]), **sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`; one that lacks these entries changes nothing."""
        if NUMBERS in state:
            self.skipped, self.micro_batches = state[NUMBERS].tolist()
            self.sums = {
                name.removeprefix(LOSS): value.view(()) for name, value in state.items() if name.startswith(LOSS)
            }
