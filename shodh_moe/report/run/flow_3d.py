"""The solid and the speed in three dimensions: a page of its own, drawn by the browser, that needs no other file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.base.files import write_text
from shodh_moe.report.page import render
from shodh_moe.report.run.load import Array, RunData
from shodh_moe.report.style import words

NAME = "flow_3d.html"
MOST_VOXELS = 64  # along each axis, which keeps a domain below 1.1 MB


def write_flow_3d(run: RunData, folder: Path) -> Path | None:
    """Write ``flow_3d.html`` with the examples of the evaluation; None, and no file, if it kept none.

    Raises:
        UserError: the folder cannot be written.
    """
    flows = [flow for domain in run.domains if (flow := _flow(run, domain))]
    path = folder / NAME
    if not flows:
        path.unlink(missing_ok=True)
        return None
    write_text(path, render("flow_3d.html.j2", run=run.name, step=run.metrics.get("step"), flows=flows))
    return path


def _flow(run: RunData, domain: str) -> dict[str, Any] | None:
    arrays = run.get(domain, "true", "pred", "solid")
    if arrays is None:
        return None
    true, predicted, solid = arrays
    speeds = [_coarse(np.linalg.norm(field[:3], axis=0)) for field in (true, predicted)]
    finite = [np.nan_to_num(speed, nan=0.0, posinf=0.0) for speed in speeds]
    largest = float(max(speed.max() for speed in finite)) or 1.0
    return {
        "name": words(domain),
        "shape": list(finite[0].shape),
        "largest": largest,
        "voxels": pack(_coarse(solid), *(speed / largest for speed in finite)),
    }


def pack(solid: Array, *shares: Array) -> str:
    """Return volumes [X, Y, Z] of values from 0 to 1 as base64 of uint8 [Z, Y, X, volume], as a 3D texture takes it."""
    volumes = np.stack([solid, *shares], axis=-1).transpose(2, 1, 0, 3)
    return base64.b64encode((volumes.clip(0, 1) * 255).round().astype(np.uint8).tobytes()).decode("ascii")


def _coarse(volume: Array) -> Array:
    """Average blocks of voxels until no axis has more than `MOST_VOXELS`; what does not fill a block is left out."""
    block = max(-(-size // MOST_VOXELS) for size in volume.shape)
    x, y, z = (size // block for size in volume.shape)
    whole = volume[: x * block, : y * block, : z * block]
    return np.asarray(whole.reshape(x, block, y, block, z, block).mean((1, 3, 5), dtype=np.float64))
