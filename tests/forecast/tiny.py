"""A forecast benchmark so small that it shows nothing, and takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import CONFIG, FLOW

STEPS = 3
PEERS: dict[str, Any] = {
    "fno": None,
    "uno": None,
    "unet": {"learning_rates": [1e-3], "batch_size": 2, "width": 2, "levels": 2},
    "dpot": {"learning_rates": [1e-3], "batch_size": 2, "width": 8, "blocks": 1, "heads": 2},
}
LIBRARY: dict[str, Any] = {
    "fno": {"learning_rates": [1e-3], "batch_size": 2, "width": 4, "modes": 4, "layers": 1},
    "uno": {"learning_rates": [1e-3], "batch_size": 2, "width": 4, "modes": 4},
}


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of a config file."""
    porous = {**FLOW, "grain": 3.0, "pulse_period": 12.0}
    base = {
        "data": {
            **CONFIG["data"],
            "root": str(folder / "data"),
            "snapshots": 6,
            "domains": {"open_channel": FLOW, "porous_media": porous},
        },
        "tokenizer": {**CONFIG["tokenizer"], "latent_copies": 1},
        "model": {"dim": 24, "depth": 1, "heads": 2, "moe": {"expert_hidden": 16}},
        "training": {"batch_size": 4},
    }
    found = {"name": "trial", "runs": str(folder / "runs"), "seeds": [3], "seconds": 8.0, "trial_seconds": 2.0}
    return {**found, "learning_rates": [1e-3], "base": base, "peers": PEERS, "steps": STEPS, "starts": 2, **changes}
