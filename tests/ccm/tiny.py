"""The smallest config of an expert: a few trajectories on a coarse grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.family import SPLITS


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a config file; ``changes`` replace sections or top-level keys."""
    return {
        "name": "anchor",
        "runs": str(folder / "runs"),
        "family": {
            "name": "reaction_diffusion",
            "root": str(folder / "data"),
            "grid": 26,
            "snapshots": 6,
            "trajectories": dict.fromkeys(SPLITS, 3),
        },
        "rollout": [1, 2],
        "training": {
            "steps": 4,
            "batch_size": 5,
            "warmup_steps": 1,
            "learning_rate": 2e-3,
            "checkpoint_every": 2,
            "log_every": 1,
            "validate_every": 4,
        },
        "parallel": {"processes": 2},
        **changes,
    }


def config(folder: Path, **changes: Any) -> ExpertConfig:
    return ExpertConfig.model_validate(tree(folder, **changes))
