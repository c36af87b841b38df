"""Use a trained model from Python: load it, and continue a flow given as arrays.

Shapes: H given snapshots, N predicted ones, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.inference.loading import Models, find_source, load_models
from shodh_moe.inference.rollout import decode_both, rollout


def load_model(path: Path | str, tokenizer: Path | str | None = None) -> Models:
    """Load a trained model on the CPU.

    Args:
        path: an exported folder, a run folder (its newest intact checkpoint) or one checkpoint.
        tokenizer: the folder of the tokenizer, if the config of a run or checkpoint no longer leads to it.

    Raises:
        UserError: there is no model, a file is damaged, or the tokenizer is missing or not the model's own.
    """
    return load_models(find_source(Path(path), Path(tokenizer) if tokenizer else None))


def forecast(
    models: Models, fields_H4XYZ: NDArray[np.floating], solid_1XYZ: NDArray[np.floating], steps: int
) -> NDArray[np.float64]:
    """Predict the next ``steps`` snapshots of a flow; runs on a GPU if there is one.

    Args:
        models: from `load_model`.
        fields_H4XYZ: velocity along x, y, z and pressure, in the units of the training data; the last
            ``model.history`` snapshots are used, which must be the training data's time step apart.
        solid_1XYZ: 1 in solid voxels, 0 in fluid.

    Returns:
        velocity and pressure at the voxel centres, float64 [N, 4, X, Y, Z].

    Raises:
        UserError: the grid is not the model's, there are too few snapshots, or a value is not finite.
    """
    grid, history = models.tokenizer.grid, models.transformer.config.history
    if list(fields_H4XYZ.shape[1:]) != [4, *grid] or list(solid_1XYZ.shape) != [1, *grid]:
        raise UserError(
            f"fields {list(fields_H4XYZ.shape)} and solid {list(solid_1XYZ.shape)} do not fit the model: "
            f"give [H, {', '.join(map(str, [4, *grid]))}] and {[1, *grid]}"
        )
    if not np.isfinite(fields_H4XYZ).all():
        raise UserError("the given fields have values that are not finite: give snapshots without NaN or infinity")
    if len(fields_H4XYZ) < history or steps < 1:
        raise UserError(
            f"{len(fields_H4XYZ)} snapshots given and {steps} asked for: give at least {history}, ask for at least 1"
        )
    given_H4XYZ, solid = (torch.from_numpy(np.asarray(a, np.float32)) for a in (fields_H4XYZ[-history:], solid_1XYZ))
    with torch.no_grad():
        predicted = [fields_4XYZ.numpy() for fields_4XYZ, _ in islice(continue_flow(models, given_H4XYZ, solid), steps)]
    for step, fields_4XYZ in enumerate(predicted, 1):
        if not np.isfinite(fields_4XYZ).all():
            raise UserError(f"the prediction is not finite at step {step}: ask for fewer steps")
    return np.stack(predicted)


def continue_flow(models: Models, fields_H4XYZ: Tensor, solid_1XYZ: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict one snapshot after another, without end, on a GPU if there is one.

    Args:
        fields_H4XYZ: exactly H snapshots of velocity and pressure in the units of the training data, float32.
        solid_1XYZ: 1 in solid voxels, 0 in fluid, float32.

    Yields:
        Velocity and pressure at the centres [4, X, Y, Z], and the velocity whose divergence vanishes [3, X, Y, Z] (see
        `Flow`), both float64 on the CPU.
    """
    z_HCxyz, geometry_1Cxyz = encode_flow(models, fields_H4XYZ, solid_1XYZ)
    solid_1XYZ = solid_1XYZ.to(z_HCxyz.device)
    for z_BCxyz in rollout(models.transformer, z_HCxyz[None], geometry_1Cxyz):
        exact_4XYZ, conserved_3XYZ = (x[0].cpu() for x in decode_both(models.tokenizer, z_BCxyz, solid_1XYZ))
        yield exact_4XYZ, conserved_3XYZ


def encode_flow(models: Models, fields_H4XYZ: Tensor, solid_1XYZ: Tensor) -> tuple[Tensor, Tensor]:
    """Encode H snapshots and their geometry, [H, C, x, y, z] and [1, C, x, y, z]; on a GPU if there is one.

    Both networks of ``models`` move there.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = models.tokenizer.to(device)
    models.transformer.to(device)
    given_H5XYZ = torch.cat([fields_H4XYZ, solid_1XYZ.expand(len(fields_H4XYZ), -1, -1, -1, -1)], dim=1)
    z_HCxyz = torch.cat([tokenizer.encode(one.to(device)) for one in given_H5XYZ.split(1)])
    return z_HCxyz, tokenizer.encode_geometry(solid_1XYZ.to(device)[None])
