"""What a rank sums up between two train records; a checkpoint has it, so that a stop leaves no trace in the records."""

from __future__ import annotations

import torch
from torch import Tensor

from shodh_moe.training.telemetry import RoutingCounts

PREFIX = "interval/"
LOSS = "interval/loss/"


class Interval:
    """Attributes:
    counts: what the routers did since the last record that told of them, which was at step ``told``.
    sums: of each loss over ``micro_batches`` micro-batches, those of applied steps since the last record.
    times: of the steps since then that this process made, seconds.
    skipped: steps that were not applied since the run began.
    """

    def __init__(self, counts: RoutingCounts):
        self.counts, self.told, self.skipped = counts, 0, 0
        self.clear()

    def clear(self) -> None:
        """Begin anew after a record."""
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.times: list[float] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """The losses of a micro-batch, 0-d."""
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, 0) + value
        self.micro_batches += 1

    def means(self) -> Tensor:
        """Of the losses, in the order of ``sums``; float64."""
        return torch.stack([value.double() for value in self.sums.values()]) / self.micro_batches

    def state(self) -> dict[str, Tensor]:
        """All but the times, as 1-D tensors."""
        numbers = torch.tensor([self.told, self.skipped, self.micro_batches])
        routing = {"table": self.counts.table_LDM.flatten(), "largest": self.counts.largest_L}
        return {
            f"{PREFIX}numbers": numbers,
            **{f"{PREFIX}routing_{name}": value for name, value in routing.items()},
            **{LOSS + name: value.view(1) for name, value in self.sums.items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `state`; one of another network, or none, leaves everything as it is."""
        table = state.get(f"{PREFIX}routing_table")
        if table is None or table.numel() != self.counts.table_LDM.numel():
            return
        self.told, self.skipped, self.micro_batches = state[f"{PREFIX}numbers"].tolist()
        device = self.counts.table_LDM.device
        self.counts.table_LDM.copy_(table.view_as(self.counts.table_LDM))
        self.counts.largest_L.copy_(state[f"{PREFIX}routing_largest"])
        self.sums = {
            name.removeprefix(LOSS): value.to(device).view(()) for name, value in state.items() if name.startswith(LOSS)
        }
