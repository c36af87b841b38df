"""The two experts between which a ccm config merges, as networks: what readouts need of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.expert import Expert, load_expert, require_same_network
from shodh_moe.checkpoint.state import load_state
from shodh_moe.merging.config import Target


def load_ends(target: Target) -> tuple[Expert, Expert]:
    """The low and the high expert of a target of ccm, of one axis, on a GPU where there is one.

    Raises:
        UserError: one is no expert, is damaged, not finite, or told its coordinate; or they are of different networks,
            units or families, or the same.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low, high = (load_expert(Path(path), device) for path in target.models)
    require_same_network([low, high])
    if low.config.family.name != high.config.family.name:
        raise UserError(
            f"{low.path} is of the family {low.config.family.name}, {high.path} of {high.config.family.name}: "
            "give experts of one family"
        )
    if low.config.network.conditioned:
        raise UserError(f"{low.path} is of a network that is told the coordinate: give experts of one that is not")
    for expert in (low, high):
        for name, values in expert.weights().items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{expert.path}: tensor {name} has NaN or infinity: use another checkpoint of its run")
    weights = high.weights()
    if all(torch.equal(values, weights[name]) for name, values in low.weights().items()):
        raise UserError(f"{low.path} and {high.path} have the same weights: give the experts of two ends")
    return low, high


def finite(value: float, digits: int = 6) -> float | None:
    """A number as JSON has it: ``digits`` significant ones; None for infinity and NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def state_record(expert: Expert) -> dict[str, Any]:
    """Which checkpoint an expert was read from: its path, and the hash that its ``state.json`` has of itself."""
    return {"path": str(expert.path), "state_sha256": load_state(expert.path)["sha256"]}
