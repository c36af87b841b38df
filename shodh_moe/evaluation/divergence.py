"""How divergence-free velocities are: always with operator, precision and norm (DESIGN 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels import divergence
from shodh_moe.metrics.fields import divergence_report
from shodh_moe.tokenizer.walls import to_faces

NORM = "h * rms(div u) / rms(u); rms over all voxels and samples, h = 1 cell"


def differentiated(u_B3XYZ: Tensor, operator: str) -> Tensor:
    """A velocity at the voxels' centres where ``operator`` differentiates it: averaged to faces for ``staggered``.

    The faces of solid voxels get the mean of their two voxels like all others. So the ``staggered`` divergence is that
    of ``central2``, up to rounding: (u[j+1] + u[j]) / 2 - (u[j] + u[j-1]) / 2 = (u[j+1] - u[j-1]) / 2.
    """
    return to_faces(u_B3XYZ) if operator == "staggered" else u_B3XYZ


def divergence_table(
    conserved: dict[torch.dtype, Tensor], data: dict[str, Tensor], operator: str
) -> list[dict[str, Any]]:
    """One row for each precision in which the velocity was conserved, then one for the data of each domain.

    Args:
        conserved: that of the predictions (`Flow`), [B, 3, X, Y, Z], cells per step, by dtype; for ``staggered`` on
            faces.
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
