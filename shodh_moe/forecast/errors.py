"""Errors and other measures of forecasts.

Shapes: N forecast snapshots, K bands of wave numbers, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shodh_moe.data import TrajectoryRecord
from shodh_moe.evaluation.divergence import differentiated
from shodh_moe.forecast.data import flows
from shodh_moe.forecast.forecasters import Forecast, Forecaster
from shodh_moe.kernels import divergence
from shodh_moe.metrics.fields import band_errors, divergence_moments, nrmse, pooled_divergence, vrmse

FIELDS = {"velocity": slice(0, 3), "pressure": slice(3, 4)}
BANDS = 3


@torch.no_grad()
def rollout_errors(
    forecaster: Forecaster, records: Iterable[TrajectoryRecord], history: int, steps: int, starts: int, operator: str
) -> dict[str, dict[str, Any]]:
    """Forecast flows of each trajectory and average the measures over the flows of each domain.

    Returns:
        by domain: ``nrmse`` and ``vrmse`` of ``velocity`` and ``pressure``, each [N]; of the velocity ``band_errors``
        (`band_errors`) and ``band_energy`` (power over the true power in each band), both [N][K]; ``divergence``
        (`pooled_divergence`, of all snapshots) and that of the true flow, ``divergence_true``; ``solid_velocity``, the
        rms velocity in solids over the true one in the fluid, [N], null without solids; ``forecasts``, their number.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for flow, true_N4XYZ in flows(record, history, steps, starts):
            forecast = forecaster(flow, steps)
            true = true_N4XYZ.double()
            found.setdefault(flow.domain, []).append(_measure(forecast, true, flow.solid_1XYZ, operator))
    return {domain: _mean(rows) for domain, rows in sorted(found.items())}


def _measure(forecast: Forecast, true_N4XYZ: Tensor, solid_1XYZ: Tensor, operator: str) -> dict[str, Any]:
    fields = forecast.fields_N4XYZ.double()
    velocity, true_velocity = fields[:, :3], true_N4XYZ[:, :3]
    solid = solid_1XYZ[0] > 0.5
    inside = velocity[..., solid].square().sum(1).mean(-1).sqrt()
    outside = true_velocity[..., ~solid].square().sum(1).mean(-1).sqrt()
    return {
        "nrmse": {name: nrmse(fields[:, part], true_N4XYZ[:, part]) for name, part in FIELDS.items()},
        "vrmse": {name: vrmse(fields[:, part], true_N4XYZ[:, part]) for name, part in FIELDS.items()},
        "band_errors": band_errors(velocity, true_velocity, BANDS),
        # The error of p + t against t is p itself.
        "band_energy": band_errors(velocity + true_velocity, true_velocity, BANDS),
        "solid_velocity": inside / outside if solid.any() else None,
        "divergence": _moments(forecast.conserved_N3XYZ, operator),
        "divergence_true": _moments(differentiated(true_velocity, operator), operator),
    }


def _moments(u_N3XYZ: Tensor, operator: str) -> Tensor:
    u = u_N3XYZ.double()
    return torch.stack([divergence_moments(div, one) for div, one in zip(divergence(u, operator), u, strict=True)])


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: list[Tensor]) -> list[Any]:
        return list(torch.stack(values).mean(0).tolist())

    found: dict[str, Any] = {
        kind: {name: mean([row[kind][name] for row in rows]) for name in FIELDS} for kind in ("nrmse", "vrmse")
    }
    found |= {kind: mean([row[kind] for row in rows]) for kind in ("band_errors", "band_energy")}
    inside = [row["solid_velocity"] for row in rows if row["solid_velocity"] is not None]
    found["solid_velocity"] = mean(inside) if inside else None
    for kind in ("divergence", "divergence_true"):
        found[kind] = pooled_divergence(torch.cat([row[kind] for row in rows]), spacing=1.0)
    return {**found, "forecasts": len(rows)}
