"""How fast trained networks learn a third domain, compared with the same networks from scratch.

A network that has lost its plasticity learns a new domain more slowly than an untrained one (Dohare et al., Nature 632,
2024). Both are trained on the third domain alone, with the same samples, steps and learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shodh_moe.audit.arms import JOINT, Run, run_config
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import diverged, run_folder
from shodh_moe.config import Config
from shodh_moe.training.records import read_run

POINTS = 12  # per curve


def pair(audit: AuditConfig, run: Run) -> tuple[Config, Config]:
    """The relearning run that starts from the trained network of ``run``, and the one from scratch."""
    training = {
        "steps": audit.relearning_steps,
        # As many samples per step as each domain has in the main set.
        "batch_size": audit.base.training.batch_size // 2,
        "learning_rate": run.config.training.learning_rate,
        "validate_every": -(-audit.relearning_steps // POINTS),
        "warmup_steps": min(audit.base.training.warmup_steps, audit.relearning_steps // 4),
    }
    moe, seed = run.config.model.moe, run.config.seed
    label = f"relearning-{run.arm}"
    trained = run_config(audit, label, moe, [audit.third], seed, training, str(run_folder(run.config)))
    return trained, run_config(audit, label, moe, [audit.third], seed, training)


def relearns(audit: AuditConfig, run: Run) -> bool:
    """Whether this run is followed by relearning: it is in a joint arm of the main set, with one of ``more_seeds``."""
    chosen = run.set == "main" and run.arm in JOINT and run.config.seed in audit.more_seeds
    return chosen and diverged(run.config) is None


def curves(audit: AuditConfig, run: Run) -> dict[str, Any] | None:
    """Validation latent MSE of the third domain over steps, for a result's ``relearning``; None without relearning."""
    if not relearns(audit, run):
        return None
    both = [_curve(run_folder(config), audit.third) for config in pair(audit, run)]
    steps = sorted({step for curve in both for step in curve})
    return {
        "domain": audit.third,
        "steps": steps,
        # A run that diverged has no points after that.
        "from_checkpoint": [both[0].get(step) for step in steps],
        "from_scratch": [both[1].get(step) for step in steps],
    }


def _curve(folder: Path, domain: str) -> dict[int, float | None]:
    return {record["step"]: record["latent_mse"][domain] for record in read_run(folder, "valid")}
