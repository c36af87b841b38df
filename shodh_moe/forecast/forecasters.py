"""One interface for everything that forecasts a flow: our model, the peers, and the baselines.

Shapes: T observed snapshots, H those that a model sees, N forecast ones, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shodh_moe.evaluation.divergence import differentiated
from shodh_moe.forecast.data import Flow
from shodh_moe.forecast.peers import PeerModel
from shodh_moe.inference.model import Model


class Forecast(NamedTuple):
    """A forecast in the units of the data.

    Attributes:
        fields_N4XYZ: velocity and pressure at the voxels' centres.
        conserved_N3XYZ: the velocity whose divergence is measured: on faces for the operator ``staggered``.
    """

    fields_N4XYZ: Tensor
    conserved_N3XYZ: Tensor


Forecaster = Callable[[Flow, int], Forecast]


def of_fields(forecast: Callable[[Flow, int], Tensor], operator: str) -> Forecaster:
    """Make a forecaster of a function that gives velocity and pressure, [N, 4, X, Y, Z]."""

    def forecaster(flow: Flow, steps: int) -> Forecast:
        fields_N4XYZ = forecast(flow, steps)
        return Forecast(fields_N4XYZ, differentiated(fields_N4XYZ[:, :3], operator))

    return forecaster


def of_model(model: Model) -> Forecaster:
    """Make a forecaster of our model."""

    def forecaster(flow: Flow, steps: int) -> Forecast:
        given_H4XYZ = flow.fields_T4XYZ[-model.history :]
        predicted = list(islice(model.continue_flow(given_H4XYZ, flow.solid_1XYZ, stride=1), steps))
        return Forecast(*(torch.stack(parts) for parts in zip(*predicted, strict=True)))

    return forecaster


def of_peer(peer: PeerModel, operator: str) -> Forecaster:
    """Make a forecaster of a peer, which feeds its predictions back. The peer is in evaluation mode from now on."""
    device = peer.scale_4111.device
    peer.eval()

    def roll(flow: Flow, steps: int) -> Tensor:
        snapshots = list(flow.fields_T4XYZ[-peer.history :].to(device))
        solid_11XYZ = flow.solid_1XYZ.to(device)[None]
        for _ in range(steps):
            snapshots.append(peer(torch.stack(snapshots[-peer.history :])[None], solid_11XYZ)[0])
        return torch.stack(snapshots[peer.history :]).cpu()

    return of_fields(roll, operator)


def device() -> str:
    """``cuda`` if torch can use it, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_peer(peer: PeerModel, weights: Path) -> PeerModel:
    """Read a peer's weights and move it to the device."""
    peer.load(weights)
    return peer.to(device())
