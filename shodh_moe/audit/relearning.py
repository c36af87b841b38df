"""Compare how fast trained networks and the same networks from scratch learn a third domain.

A network that has lost its plasticity learns a new domain more slowly than an untrained one (Dohare et al., Nature 632,
2024). Both are trained on the third domain only, with the same samples, steps and learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shodh_moe.audit.arms import RELEARNING, Run, run_config
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import diverged, run_folder
from shodh_moe.base.records import read_run
from shodh_moe.config import Config

POINTS = 12  # number of validations per curve


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
    model, seed = run.config.model, run.config.seed
    label = f"relearning-{run.arm}"
    trained = run_config(audit, label, model, [audit.third], seed, training, str(run_folder(run.config)))
    return trained, run_config(audit, label, model, [audit.third], seed, training)


def relearns(audit: AuditConfig, run: Run) -> bool:
    """Whether relearning follows a run: its arm in `RELEARNING`, its set ``main``, its seed in ``more_seeds``, and it
    did not diverge.
    """
    chosen = run.set == "main" and run.arm in RELEARNING and run.config.seed in audit.more_seeds
    return chosen and diverged(run.config) is None


def curves(audit: AuditConfig, run: Run) -> dict[str, Any] | None:
    """A result's entry ``relearning``: validation latent MSE of the third domain over steps; None if not relearned.

    ``from_checkpoint`` and ``from_scratch`` have a value for each of ``steps``; None after a run diverged.
    """
    if not relearns(audit, run):
        return None
    both = [_curve(run_folder(config), audit.third) for config in pair(audit, run)]
    steps = sorted({step for curve in both for step in curve})
    return {
        "domain": audit.third,
        "steps": steps,
        "from_checkpoint": [both[0].get(step) for step in steps],
        "from_scratch": [both[1].get(step) for step in steps],
    }


def _curve(folder: Path, domain: str) -> dict[int, float | None]:
    return {record["step"]: record["latent_mse"][domain] for record in read_run(folder, "valid")}
