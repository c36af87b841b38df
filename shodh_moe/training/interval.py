"""What a rank sums up between two train records; a checkpoint has it, so that a stop leaves no trace in the records."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = "interval/numbers"
LOSS = "interval/loss/"


class Interval:
    """Attributes:
    sums: of each loss over ``micro_batches`` micro-batches, those of applied steps since the last record.
    times: of the steps since then that this process made, seconds.
    skipped: steps that were not applied since the run began.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.clear()

    def clear(self) -> None:
        """Begin anew after a record."""
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.times: list[float] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """The losses of a micro-batch, 0-d."""
        for key, value in losses.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.micro_batches += 1

    def means(self) -> Tensor:
        """Of the losses, in the order of ``sums``; float64."""
        return torch.stack([value.double() for value in self.sums.values()]) / self.micro_batches

    def state(self) -> dict[str, Tensor]:
        """All but the times, as 1-D tensors."""
        sums = {LOSS + name: value.view(1) for name, value in self.sums.items()}
        return {NUMBERS: torch.tensor([self.skipped, self.micro_batches]), **sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `state`; one without it leaves everything as it is."""
        if NUMBERS in state:
            self.skipped, self.micro_batches = state[NUMBERS].tolist()
            self.sums = {
                name.removeprefix(LOSS): value.view(()) for name, value in state.items() if name.startswith(LOSS)
            }
