"""An example flow for a service: one of a file, or a synthetic one."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.data.dataset import Fields, open_dataset
from shodh_moe.inference.model import Model


def example_flow(model: Model, path: Path | None = None) -> Fields:
    """Return the first snapshots of a file's first trajectory, or vortices that look like no training data.

    Raises:
        UserError: the file cannot be read or does not fit the model.
    """
    if path is None:
        return _vortices(model)
    fields = open_dataset(path)[0, : model.span()]
    try:
        model.checked(fields, 1, model.strides[0])
    except UserError as error:
        raise UserError(f"--example {path}: {error}") from None
    return fields


def _vortices(model: Model) -> Fields:
    """Taylor-Green vortices that drift along x, around a block of solid, with the speed of the training data."""
    x, y, z = (2 * math.pi * (torch.arange(size) + 0.5) / size * torch.ones(()) for size in model.grid)
    speed, pressure = float(model.tokenizer.velocity_rms), float(model.tokenizer.pressure_rms)
    solid_XYZ = torch.zeros(model.grid)
    a, b, c = (max(size // 8, 1) for size in model.grid)
    solid_XYZ[3 * a : 5 * a, 3 * b : 5 * b, 3 * c : 5 * c] = 1
    velocity, pressures = [], []
    for step in range(model.span()):
        X, Y, Z = torch.meshgrid(x - 0.2 * step, y, z, indexing="ij")
        u = torch.stack([X.sin() * Y.cos() * Z.cos(), -X.cos() * Y.sin() * Z.cos(), torch.zeros_like(X)])
        velocity.append(2 * speed * u * (1 - solid_XYZ))
        pressures.append(pressure * ((2 * X).cos() + (2 * Y).cos())[None] * (1 - solid_XYZ) / 2)
    return Fields({"velocity": torch.stack(velocity), "pressure": torch.stack(pressures), "solid": solid_XYZ[None]})
