"""A run folder, and records as training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(step: int, kind: str = "train") -> dict[str, Any]:
    layer = {"layer": 0, "load": {"calm": [0.25, 0.75]}, "load_all": [0.25, 0.75], "dropped_fraction": {"calm": 0.5}}
    if kind == "valid":
        return {"kind": "valid", "step": step, "latent_mse": {"calm": 0.5 + step}}
    return {"kind": "train", "step": step, "loss": 1.0 / step, "routing": [layer]}


def make_run(folder: Path) -> Path:
    """Make a run folder with a config and an environment."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: small\ntraining: {steps: 7}\n")
    (folder / "environment.json").write_text(json.dumps({"commit": "0123abc"}))
    return folder


def add_results(run: Path) -> None:
    """Add an evaluation and a report."""
    metrics = {"step": 9, "domains": {"calm": {"latent_mse": 0.125, "rollout_nrmse": [0.1, 0.2], "n_tokens": 8}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "report").mkdir()
    (run / "report/index.html").write_text("<p>a report")
    picture = b"\x89PNG\r\n\x1a\n" + bytes.fromhex(
        "0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
    (run / "report/losses.png").write_bytes(picture)
