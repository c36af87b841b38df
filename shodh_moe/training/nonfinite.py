"""Handle a loss or gradient that is not finite: report where it came from, then stop or skip the step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.model import Routing
from shodh_moe.training.telemetry import first_nonfinite

MAX_SKIPPED = 10  # in a row; after that the network itself must be broken


@dataclass(frozen=True)
class MicroBatch:
    """One call of the model.

    Attributes:
        picks: the samples as (domain, index).
        domain_B: int64, number of each sample's domain.
        error_B: mean squared error of each sample.
        losses: 0-d losses by name.
        routing: routing of each MoE layer.
    """

    picks: list[tuple[int, int]]
    domain_B: Tensor
    error_B: Tensor
    losses: dict[str, Tensor]
    routing: list[Routing]


class Samples(Protocol):
    """The source of micro-batches."""

    domains: list[str]

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Locate a sample for a report: file, trajectory, first snapshot, and whether its values are finite."""


class NonFinite:
    """Applies ``training.on_nonfinite``. Every rank calls `handle` for the same steps.

    Args:
        policy: ``halt`` or ``skip``.
        run: the run folder.
        samples: the source of the micro-batches.
        remedy: config key of the learning rate, which is often too high.
    """

    def __init__(self, policy: str, run: Path, samples: Samples, remedy: str = "training.learning_rate"):
        self.policy, self.run, self.samples = policy, run, samples
        self.remedy = remedy
        self._in_a_row = 0

    def step_applied(self) -> None:
        """Note that a step was applied, which ends a series of skipped steps."""
        self._in_a_row = 0

    def handle(self, step: int, batches: list[MicroBatch]) -> None:
        """Call after a step that was not applied: save a report, then raise or print a warning (collective).

        ``nonfinite/<step>.json`` in the run folder holds, for each rank, the losses and samples of every micro-batch
        (domain, data file, trajectory, first snapshot), and the first layer and domain with broken logits.

        Raises:
            UserError: the policy is ``halt``, or too many steps in a row were skipped.
        """
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, self._report(batches))
        path = self.run / "nonfinite" / f"{step}.json"
        if dist.get_rank() == 0:
            write_text(path, json.dumps({"step": step, "ranks": reports}, indent=1) + "\n")
        self._in_a_row += 1
        where = "; ".join(_where(rank, report) for rank, report in enumerate(reports) if report["broken"])
        where = where or "every loss is finite, only gradients are not"
        message = f"step {step} has a loss or gradient that is not finite ({where}); its samples are in {path}"
        if self.policy == "halt":
            raise UserError(f"{message}: look at those samples, lower {self.remedy}, or set training.on_nonfinite=skip")
        if self._in_a_row >= MAX_SKIPPED:
            raise UserError(f"{message}; {MAX_SKIPPED} steps in a row were skipped: lower {self.remedy}")
        if dist.get_rank() == 0:
            print(f"warning: {message}; the step is skipped", flush=True)

    def _report(self, batches: list[MicroBatch]) -> dict[str, Any]:
        records, broken = [], None
        for number, batch in enumerate(batches):
            losses = {key: float(value) for key, value in batch.losses.items()}
            finite = all(math.isfinite(value) for value in losses.values())
            layer, domain = first_nonfinite(batch.routing, batch.domain_B, self.samples.domains) or (None, None)
            bad_B = ~batch.error_B.isfinite()
            if domain is None and bad_B.any():
                domain = self.samples.domains[int(batch.domain_B[bad_B.int().argmax()])]
            if broken is None and not (finite and domain is None):
                broken = {"micro_batch": number, "layer": layer, "domain": domain}
            records.append(
                {
                    # JSON has no NaN.
                    "losses": {key: value if math.isfinite(value) else str(value) for key, value in losses.items()},
                    "samples": [self.samples.describe(domain, index) for domain, index in batch.picks],
                }
            )
        return {"broken": broken, "micro_batches": records}


def _where(rank: int, report: dict[str, Any]) -> str:
    broken = report["broken"]
    layer = "after the last layer" if broken["layer"] is None else f"layer {broken['layer']}"
    return f"rank {rank}: {layer}, domain {broken['domain'] or 'unknown'}"
