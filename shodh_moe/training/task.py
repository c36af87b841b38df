"""The interface between the training loop and what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from shodh_moe.config.inputs import Inputs
from shodh_moe.training.engine import Engine, Step


class Task(Protocol):
    """One rank's part of a training. All ranks call all methods in the same order.

    Attributes:
        engine: holds the network.
        name: label of the progress bar.
        tokens: number of tokens in one rank's micro-batch, from which records compute the speed. A network without
            tokens counts samples.
        facts: entries that checkpoints keep in addition to the trainer's own.
        inputs: what the training depends on besides its config. Checkpoints record it, and a run that resumes from one
            must have the same. Only that of rank 0 is used.
    """

    engine: Engine
    name: str
    tokens: int
    facts: dict[str, Any]
    inputs: Inputs

    def check_start(self, state: dict[str, Any]) -> str | None:
        """Return why the weights of another run, given its ``state.json``, would mean something else here, or None."""

    def begin(self, step: int, logs: bool) -> None:
        """Prepare for the micro-batches of the step that ends as ``step``; ``logs`` says whether it gets a record."""

    def losses(self, micro_batch: int) -> dict[str, Tensor]:
        """Run the forward pass of one micro-batch, numbered over the whole run.

        Returns 0-d losses by name; the one called ``loss`` is minimised.
        """

    def end(self, step: int, applied: bool) -> None:
        """Finish a step. It was not applied if a loss or gradient was not finite. May raise to stop the training."""

    def record(self, step: int, result: Step) -> dict[str, Any]:
        """Return entries for a train record besides losses, norms and speed (collective)."""

    def validate(self) -> dict[str, Any]:
        """Return the entries of a validation record (collective)."""

    def state(self) -> dict[str, Tensor]:
        """Return what this rank accumulates over steps, 1-D tensors by name, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`. One that does not fit, or is incomplete, changes nothing."""

    def finish(self, keep_going: Callable[[], bool]) -> bool:
        """Do the work after the last step, also in a resumed run with no steps left (collective).

        Long work calls ``keep_going`` regularly, equally often on all ranks, and returns False as soon as that does.
        """
