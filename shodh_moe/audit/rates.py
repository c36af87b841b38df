"""The choice of learning rates: for each arm alike, on validation data alone, at seeds that serve nothing else.

One seed is not enough: a high rate that is the best on one can be unstable on the next.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from shodh_moe.audit.arms import Run, all_runs, tuning_runs
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import validation_score
from shodh_moe.base.errors import UserError


def tuning(audit: AuditConfig) -> dict[str, Any]:
    """The choice for each arm, by `tuned_as`.

    Returns:
        ``learning_rates``; ``valid_latent_mse`` of each, over that of persistence (mean of `validation_score` over
        ``tuning_seeds``), infinite where a run diverged; ``chosen``, the best rate, the smallest if all diverged;
        ``at_edge``: a better one might lie outside. A single rate is chosen without a run and has no errors.
    """
    rates, found = audit.learning_rates, {}
    for name, runs in tuning_runs(audit).items():
        scores = [fmean(validation_score(run.config) for run in runs[rate]) for rate in rates] if len(rates) > 1 else []
        chosen = rates[scores.index(min(scores))] if scores else rates[0]
        found[name] = {
            "learning_rates": rates,
            "valid_latent_mse": scores,
            "chosen": chosen,
            "at_edge": bool(scores) and chosen in (rates[0], rates[-1]),
        }
    return found


def choose_rates(audit: AuditConfig) -> dict[str, float]:
    """The learning rate of each arm, by `tuned_as`."""
    return {name: record["chosen"] for name, record in tuning(audit).items()}


def find_run(audit: AuditConfig, name: str) -> Run:
    """The run of that name, with the learning rates that were chosen.

    Raises:
        UserError: there is none.
    """
    for one in all_runs(audit, choose_rates(audit)):
        if one.name == name:
            return one
    raise UserError(f"the audit {audit.folder} has no run {name}: run `shodh audit` with its config")
