"""The outcome of a training run: whether it has ended, whether it diverged, and its validation error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import read_run
from shodh_moe.config import Config

# A run counts as diverged if its error exceeds that of persistence (repeating the last snapshot) by this factor.
DIVERGED_ABOVE = 10.0


def run_folder(config: Config) -> Path:
    return Path(config.runs) / config.name


def last_checkpoint(config: Config) -> Path:
    """Path of the last step's checkpoint, whether or not it exists yet."""
    return run_folder(config) / "checkpoints" / str(config.training.steps)


def ended(config: Config) -> bool:
    """Whether the run needs no more training: its last checkpoint exists, or it diverged."""
    return (last_checkpoint(config) / "state.json").exists() or diverged(config) is not None


def diverged(config: Config) -> str | None:
    """Say why and at which step a run diverged; None if it did not diverge or has not ended.

    A run diverged if it stopped at a loss or gradient that was not finite, or if its last validation error is not
    finite or more than `DIVERGED_ABOVE` times that of persistence.
    """
    folder = run_folder(config)
    if not (last_checkpoint(config) / "state.json").exists():
        steps = [int(path.stem) for path in (folder / "nonfinite").glob("*.json")]
        return f"a loss or gradient was not finite at step {min(steps)}" if steps else None
    last = (read_run(folder, "valid") or [{"step": config.training.steps, "latent_mse": {"every domain": None}}])[-1]
    for domain, error in last["latent_mse"].items():
        if error is None or not math.isfinite(error):
            return f"the validation error of {domain} was not finite at step {last['step']}"
        times = error / last["latent_mse_persistence"][domain]
        if times > DIVERGED_ABOVE:
            return f"the validation error of {domain} was {times:.3g} times that of persistence at step {last['step']}"
    return None


def validation_score(config: Config) -> float:
    """The last validation latent MSE relative to persistence, unweighted mean over domains; infinite if diverged."""
    if diverged(config):
        return math.inf
    ratios = relative_errors(last_validation(config))
    return sum(ratios.values()) / len(ratios)


def last_validation(config: Config) -> dict[str, Any]:
    """The last validation record of a run. Raises `UserError` if it has none, because it was not trained."""
    records = read_run(run_folder(config), "valid")
    if not records:
        raise UserError(f"{run_folder(config)} has no validation record: repeat the command that trains its runs")
    return records[-1]


def relative_errors(record: dict[str, Any]) -> dict[str, float]:
    """The latent MSE of each domain relative to persistence, from a validation record whose errors are finite."""
    persistence = record["latent_mse_persistence"]
    return {domain: error / persistence[domain] for domain, error in record["latent_mse"].items()}
