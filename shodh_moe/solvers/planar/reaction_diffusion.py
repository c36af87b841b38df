"""FitzHugh-Nagumo reaction-diffusion in a square with no flux through its sides, as in PDEBench.

    u_t = D_u lap(u) + u - u^3 - k - v        v_t = D_v lap(v) + u - v

Cosine series in space on cell centres, which have exactly no flux, and ETDRK4 in time, which treats diffusion exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.solvers.limits import DivergedError
from shodh_moe.solvers.planar.checks import first_bad, require_finite, require_input, substeps
from shodh_moe.solvers.planar.etdrk4 import advance, coefficients

CHANNELS = ("activator", "inhibitor")
# Largest 3 max(u^2) step that is accepted, 3 u^2 being the reaction's decay rate: unstable from about 2.8 on.
REACTION = 2.5


@dataclass(frozen=True)
class ReactionDiffusion:
    """Constants of the equation and of the solver.

    Attributes:
        inhibitor_diffusivity: D_v. (D_u is each trajectory's parameter.)
        threshold: k.
        side: length of the square, [-side/2, side/2]^2.
        step: longest time step; the reaction alone limits it, see `REACTION`.
        initial_modes: cosine modes per direction of the random initial fields.
        initial_length: correlation length of these fields.
    """

    inhibitor_diffusivity: float = 5e-3
    threshold: float = 5e-3
    side: float = 2.0
    step: float = 0.0125
    initial_modes: int = 24
    initial_length: float = 0.1


def random_initial(
    seeds: Sequence[np.random.SeedSequence], grid: int, settings: ReactionDiffusion | None = None
) -> torch.Tensor:
    """Draw Gaussian random fields of unit variance, [B, 2, grid, grid] float64: the same function on every grid.

    Raises:
        UserError: the grid is too coarse for ``initial_modes``.
    """
    settings = settings or ReactionDiffusion()
    modes = settings.initial_modes
    if grid < modes:
        raise UserError(f"the initial fields have {modes} modes per direction: a grid of {grid} is too coarse for them")
    wave = math.pi / settings.side * np.arange(modes)
    spectrum = np.exp(-((settings.initial_length / 2) ** 2) * (wave[:, None] ** 2 + wave[None, :] ** 2))
    spectrum /= math.sqrt((spectrum**2).sum())
    coefficients_BC = np.zeros((len(seeds), 2, grid, grid))
    for row, seed in zip(coefficients_BC, seeds, strict=True):
        row[:, :modes, :modes] = spectrum * np.random.default_rng(seed).standard_normal((2, modes, modes))
    # The functions of an orthonormal series have mean square 1 / grid^2.
    return _transform(grid * torch.from_numpy(coefficients_BC), cosines(grid).mT)


def simulate(
    initial_BCHW: torch.Tensor,
    diffusivity_B: torch.Tensor,
    snapshots: int,
    interval: float,
    settings: ReactionDiffusion | None = None,
) -> torch.Tensor:
    """Fields at times 0, interval, ..., (snapshots - 1) interval: [B, T, 2, H, W], channels `CHANNELS`.

    Args:
        initial_BCHW: u and v at cell centres, float32 or float64.
        diffusivity_B: D_u > 0 of each trajectory.

    Raises:
        UserError: an argument has a wrong shape or value, see `checks.require_input`.
        DivergedError: a trajectory is not finite, or reacts too fast for the step; the message names it.
    """
    settings = settings or ReactionDiffusion()
    diffusivity_B = require_input(initial_BCHW, 2, diffusivity_B, "diffusivity", snapshots, interval)
    count = substeps(interval, settings.step)
    height, width = initial_BCHW.shape[-2:]
    rows, columns = cosines(height).to(initial_BCHW), cosines(width).to(initial_BCHW)
    laplace_HW = -(_wavenumbers(height, settings.side)[:, None] ** 2 + _wavenumbers(width, settings.side) ** 2)
    rates_BC = diffusivity_B.double().cpu()[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    rates_BC = rates_BC + torch.tensor([0.0, settings.inhibitor_diffusivity], dtype=torch.float64)
    factors = coefficients(rates_BC[..., None, None] * laplace_HW, interval / count, initial_BCHW)

    def reaction(series_BCHW: torch.Tensor) -> torch.Tensor:
        u, v = _transform(series_BCHW, rows.mT, columns.mT).unbind(1)
        return _transform(torch.stack((u - u * u * u - settings.threshold - v, u - v), 1), rows, columns)

    def require_stable(fields_BCHW: torch.Tensor, time: float) -> None:
        require_finite(fields_BCHW, time, "give the settings a smaller step")
        longest_B = REACTION / (3 * fields_BCHW[:, 0].square().amax((-2, -1)))
        bad = first_bad(longest_B >= interval / count)
        if bad is not None:
            raise DivergedError(
                f"trajectory {bad} of {len(fields_BCHW)} reacts too fast at time {time:g} for steps of "
                f"{interval / count:g}: give the settings a step of at most {longest_B[bad].item():.2g}"
            )

    require_stable(initial_BCHW, 0.0)
    series = _transform(initial_BCHW, rows, columns)
    fields = [initial_BCHW]
    for snapshot in range(1, snapshots):
        for _ in range(count):
            series = advance(series, reaction, factors)
        fields.append(_transform(series, rows.mT, columns.mT))
        require_stable(fields[-1], snapshot * interval)
    return torch.stack(fields, 1)


def cosines(size: int) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) of ``size`` cell centres, [modes, cells] float64."""
    cells = torch.arange(size, dtype=torch.float64) + 0.5
    matrix = torch.cos(math.pi / size * torch.arange(size, dtype=torch.float64)[:, None] * cells) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _wavenumbers(size: int, side: float) -> torch.Tensor:
    return math.pi / side * torch.arange(size, dtype=torch.float64)


def _transform(fields: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``rows @ field @ columns^T`` for each field by batched products, which at these sizes beat an FFT."""
    columns = rows if columns is None else columns
    flat = fields.flatten(0, -3)
    # bmm rounds every field alike, however many there are; one large product would not.
    left = torch.bmm(rows.expand(len(flat), -1, -1), flat)
    return torch.bmm(left, columns.mT.expand(len(flat), -1, -1)).view(*fields.shape[:-2], len(rows), len(columns))
