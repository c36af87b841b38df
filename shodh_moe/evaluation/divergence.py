"""Divergence of velocities, always reported with operator, precision and norm (DESIGN 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels import divergence
from shodh_moe.metrics.fields import divergence_report
from shodh_moe.tokenizer.walls import to_faces

NORM = "h * rms(div u) / rms(u); rms over all voxels and samples, h = 1 cell"


def differentiated(u_B3XYZ: Tensor, operator: str) -> Tensor:
    """Move a velocity from voxel centres to where ``operator`` differentiates it: to the faces for ``staggered``.

    Every face, also of solid voxels, gets the mean of its two voxels. The ``staggered`` divergence then equals that of
    ``central2``, up to rounding: (u[j+1] + u[j]) / 2 - (u[j] + u[j-1]) / 2 = (u[j+1] - u[j-1]) / 2.
    """
    return to_faces(u_B3XYZ) if operator == "staggered" else u_B3XYZ


def divergence_table(
    conserved: dict[torch.dtype, Tensor], data: dict[str, Tensor], operator: str
) -> list[dict[str, Any]]:
    """One row per dtype of the conserved velocity, then one per domain for its data.

    Args:
        conserved: conserved velocity of the predictions (`Flow`) by dtype, [B, 3, X, Y, Z], cells per step; on faces
            for ``staggered``.
        data: true velocities by domain at the voxels' centres, float64.
        operator: the derivative operator of the decoder.
    """
    where = ", on faces" if operator == "staggered" else ""
    rows = [(f"decoded prediction in {_name(dtype)}{where}", u) for dtype, u in conserved.items()]
    rows += [
        (f"the simulated data, {domain}{where and ', averaged to faces'}", differentiated(u, operator))
        for domain, u in data.items()
    ]
    return [
        {
            "what": what,
            "operator": operator,
            "dtype": _name(u.dtype),
            **divergence_report(divergence(u, operator), u, spacing=1.0),
            "spacing": 1.0,
            "norm": NORM,
        }
        for what, u in rows
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
