"""An audit too small to show anything, for tests of the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shodh_moe.audit.config import AuditConfig
from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from tests.tiny import CONFIG, FLOW


def tree(folder: Path, **keys: Any) -> dict[str, Any]:
    """Return the content of a config file for `audit`."""
    domains = {"open_channel": FLOW, "porous_media": {**FLOW, "grain": 3.0}, "decaying_turbulence": FLOW}
    moe = {
        "expert_hidden": 16,
        "shared_experts": 1,
        "attention": "shared",
        "router": {"lr_scale": 1.0, "commitment_weight": 0.0},
    }
    base = {
        "data": {**CONFIG["data"], "root": str(folder / "data"), "domains": domains},
        "tokenizer": {**CONFIG["tokenizer"], "root": str(folder / "tokenizers")},
        "model": {"dim": 24, "depth": 1, "heads": 2, "moe": moe},
        "training": {"steps": 4, "batch_size": 6, "warmup_steps": 1, "checkpoint_every": 4, "log_every": 1},
        "telemetry": {"every": 1},
        "parallel": {"processes": 1},
    }
    unseen = {"open_channel": {**FLOW, "bed": ["dunes"]}, "porous_media": {**FLOW, "grain": 3.0, "geometry": ["blobs"]}}
    return {
        "name": "trial",
        "runs": str(folder / "runs"),
        "seeds": [0],
        "more_seeds": [0],
        "tuning_seeds": [1000],
        "learning_rates": [1e-3],
        "hard": [],
        "experts": [],
        "relearning_steps": 4,
        "gradient_samples": 2,
        "probes": 2,
        "base": base,
        "unseen": unseen,
        **keys,
    }


def audit(folder: Path, **keys: Any) -> AuditConfig:
    return AuditConfig.model_validate(tree(folder, **keys))


def make_transformer(config: Config) -> LatentTransformer:
    """Make an untrained transformer for 6 channels on a grid of 2^3, in evaluation mode, whose head is not zero."""
    transformer = LatentTransformer(config.model, 6, 0, ExpertParallel())
    torch.nn.init.normal_(transformer.head.weight, std=0.1)
    return transformer.eval()
