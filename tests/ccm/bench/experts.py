"""A benchmark of one small family whose experts are untrained, and regimes on their path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shodh_moe.ccm.bench.config import BenchConfig, checkpoint_of_last_step
from shodh_moe.ccm.bench.run import _experts
from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.ccm.readout import clip
from shodh_moe.checkpoint.state import load_state
from tests.ccm.synthetic import CHANNELS, GRID, SNAPSHOTS, initial, make_expert, save_expert, write_split

KEY = "reaction_diffusion"
REGIMES: dict[str, list[float]] = {"validation": [-1.2, 0.6], "ood_low": [], "ood_high": [1.35]}


def bench(folder: Path, variants: dict[str, Any], **changes: Any) -> BenchConfig:
    family = {"name": KEY, "root": str(folder / "data"), "grid": GRID, "snapshots": SNAPSHOTS, "coordinates": REGIMES}
    phase = {"rollout": [1], "training": {"steps": 2, "batch_size": 5, "warmup_steps": 1}}
    one = {"family": family, "anchor": phase, "endpoint": phase, "frames": 3, "variants": variants, **changes}
    tree = {"name": "bench", "runs": str(folder), "seeds": [0], "families": {KEY: one}}
    return BenchConfig.model_validate(tree)


def write_experts(config: BenchConfig) -> dict[str, Expert]:
    """Write untrained experts of one anchor for every role of every variant, by name."""
    made: dict[str, Expert] = {}
    for number, expert in enumerate(sorted(_experts(config).values(), key=lambda one: bool(one.start))):
        if expert.network.conditioned:
            continue
        near = made[Path(expert.start).name] if expert.start else None
        one = made[expert.name] = make_expert(expert, number, near)
        start = None
        if expert.start:
            anchor = checkpoint_of_last_step(near.config)  # type: ignore[union-attr]
            start = {"path": str(anchor), "step": 2, "sha256": load_state(anchor)["sha256"]}
        save_expert(checkpoint_of_last_step(expert), expert, one.network, one.scale, CHANNELS, start=start)
    return made


def write_truth(config: BenchConfig, low: Expert, high: Expert, curve: Any = None) -> None:
    """Write the regimes that the line between two experts, or another curve, predicts at alpha = s."""
    family = config.families[KEY].family
    for split in ("validation", "ood_high"):
        fields = {}
        for number, s in enumerate(family.family().coordinates[split]):
            first, expert = initial(number, count=1), (curve or (lambda alpha: compose(low, high, alpha)))(clip(s))
            fields[s] = torch.cat([first, expert.predict(first, SNAPSHOTS - 1, 0.0)], dim=1)
        write_split(config.expert(KEY, 0, "anchor"), split, fields)
