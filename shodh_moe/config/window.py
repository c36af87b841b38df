"""How many snapshots a sample of latents spans."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The snapshots of a sample: those that the model is given, and those that it predicts from them.

    Attributes:
        history: number of given snapshots.
        ahead: number of predicted snapshots.
        stride: distance of each from the one before, in snapshots of the data.
        stride_key: config key of the stride, for error messages.
    """

    history: int
    ahead: int = 1
    stride: int = 1
    stride_key: str = "model.strides"

    @property
    def snapshots(self) -> int:
        """Number of snapshots of the data from the first to the last, both included."""
        return (self.history + self.ahead - 1) * self.stride + 1

    def __str__(self) -> str:
        """The keys that make it long, with their values."""
        parts = [f"model.history {self.history}"]
        parts += [f"{self.stride_key} {self.stride}"] if self.stride > 1 else []
        parts += [f"training.unroll {self.ahead}"] if self.ahead > 1 else []
        return " with ".join([parts[0], " and ".join(parts[1:])] if parts[1:] else parts)
