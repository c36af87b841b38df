"""How a training run ended: whether it is done, whether it diverged, and with which validation error."""

from __future__ import annotations

import math
from pathlib import Path

from shodh_moe.config import Config
from shodh_moe.training.records import read_run

# Times the error of persistence (the last snapshot again) from which on a run counts as diverged.
DIVERGED_ABOVE = 10.0


def run_folder(config: Config) -> Path:
    return Path(config.runs) / config.name


def last_checkpoint(config: Config) -> Path:
    """Where the checkpoint of the last step is, once it is there."""
    return run_folder(config) / "checkpoints" / str(config.training.steps)


def ended(config: Config) -> bool:
    """Whether there is nothing left to train: the last checkpoint is there, or the run diverged."""
    return (last_checkpoint(config) / "state.json").exists() or diverged(config) is not None


def diverged(config: Config) -> str | None:
    """Why a run counts as diverged and at which step; None if it does not, or has not ended.

    It ended at a loss or gradient that was not finite, or its last validation error is not finite or more than
    `DIVERGED_ABOVE` times that of persistence.
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
    """Last validation latent MSE over that of persistence, mean over the run's domains: each counts alike.

    Infinite for a run that diverged.
    """
    if diverged(config):
        return math.inf
    last = read_run(run_folder(config), "valid")[-1]
    ratios = [error / last["latent_mse_persistence"][domain] for domain, error in last["latent_mse"].items()]
    return sum(ratios) / len(ratios)
