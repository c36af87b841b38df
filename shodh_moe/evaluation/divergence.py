"""How divergence-free velocities are: always with operator, precision and norm (DESIGN 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh_moe.evaluation.metrics import divergence_report
from shodh_moe.kernels import divergence

NORM = "h * rms(div u) / rms(u); rms over all voxels and samples, h = 1 cell"


def divergence_table(
    decoded: dict[torch.dtype, Tensor], data: dict[str, Tensor], operator: str
) -> list[dict[str, Any]]:
    """One row for each precision of the decoder's curl, then one for the data of each domain.

    Args:
        decoded: velocities of the predictions, [B, 3, X, Y, Z], cells per step, by the dtype of the curl.
        data: true velocities by domain, float64.
        operator: the derivative operator of the decoder.
    """
    rows = [(f"decoded prediction, curl in {str(dtype).removeprefix('torch.')}", u) for dtype, u in decoded.items()]
    rows += [(f"the simulated data, {domain}", u) for domain, u in data.items()]
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
