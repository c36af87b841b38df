"""How divergence-free velocities are: always with operator, precision and norm (DESIGN 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh_moe.evaluation.metrics import divergence_report
from shodh_moe.kernels import divergence

NORM = "h * rms(div u) / rms(u); rms over all voxels and samples, h = 1 cell"


def divergence_table(velocities: dict[str, tuple[Tensor, Tensor]], operator: str) -> list[dict[str, Any]]:
    """Rows for decoded predictions in float64 and float32, and for the data itself.

    Args:
        velocities: per domain the decoded prediction and the truth, [T, 3, X, Y, Z] in float64, cells per step.
        operator: the derivative operator of the decoder.
    """
    predicted = torch.cat([pair[0] for pair in velocities.values()])
    rows = [
        ("decoded prediction, curl in float64", predicted),
        ("the same velocity rounded to float32", predicted.float()),
    ]
    rows += [(f"the simulated data, {domain}", pair[1]) for domain, pair in velocities.items()]
    return [
        {
            "what": what,
            "operator": operator,
            "dtype": str(u.dtype).removeprefix("torch."),
            **divergence_report(divergence(u, operator), u, spacing=1.0),
            "spacing": 1.0,
            "norm": NORM,
        }
        for what, u in rows
    ]
