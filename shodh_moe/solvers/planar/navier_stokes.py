"""Two-dimensional Navier-Stokes on a torus in vorticity form, forced, with a viscosity for each trajectory.

    w_t + u . grad(w) = nu lap(w) + f        u = (d psi/dy, -d psi/dx)        -lap(psi) = w

Fourier series in space with products dealiased by the 2/3 rule, and ETDRK4 in time, which treats viscosity exactly. The
means of w and of u are zero.
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

CHANNELS = ("vorticity",)
# Largest (max |u| + max |v|) k_max step that is accepted: the method is unstable from about 2.8 on.
COURANT = 2.0


@dataclass(frozen=True)
class NavierStokes:
    """Constants of the equation and of the solver.

    Attributes:
        side: length of the square.
        forcing: amplitude of f = forcing (sin(2 pi (x + y) / side) + cos(2 pi (x + y) / side)), as in Li et al. 2021.
        step: longest time step; advection alone limits it, see `COURANT`.
        initial_rms: root mean square of the random initial vorticity.
        initial_modes: largest wave number of the initial vorticity, in waves per side.
    """

    side: float = 1.0
    forcing: float = 0.1
    step: float = 0.0125
    initial_rms: float = 1.0
    initial_modes: int = 12


def random_initial(
    seeds: Sequence[np.random.SeedSequence], grid: int, settings: NavierStokes | None = None
) -> torch.Tensor:
    """Draw a Gaussian random vorticity from each seed, [B, 1, grid, grid] float64: the same function on every grid.

    Its spectrum is that of Li et al. 2021, (-lap + 49)^(-5/2) on the unit square, cut at ``initial_modes``.

    Raises:
        UserError: the grid is too coarse for ``initial_modes``.
    """
    settings = settings or NavierStokes()
    modes = settings.initial_modes
    if 3 * modes >= grid:
        raise UserError(f"the initial vorticity has {modes} waves per side: give a grid larger than {3 * modes}")
    k = np.arange(-modes, modes + 1)
    spectrum = (4 * math.pi**2 * (k[:, None] ** 2 + k[None, :] ** 2) + 49.0) ** -1.25
    spectrum[modes, modes] = 0.0
    spectrum *= settings.initial_rms / math.sqrt((spectrum**2).sum())
    full = np.zeros((len(seeds), 1, grid, grid), dtype=np.complex128)
    for row, seed in zip(full, seeds, strict=True):
        parts = np.random.default_rng(seed).standard_normal((2, 2 * modes + 1, 2 * modes + 1))
        row[0, k[:, None], k[None, :]] = spectrum * (parts[0] + 1j * parts[1])
    return torch.from_numpy(np.fft.ifft2(full).real * grid**2)


def forcing(settings: NavierStokes, height: int, width: int) -> torch.Tensor:
    """The force f on the vorticity, [H, W] float64."""
    x = torch.arange(width, dtype=torch.float64) / width
    y = torch.arange(height, dtype=torch.float64)[:, None] / height
    return settings.forcing * (torch.sin(2 * math.pi * (x + y)) + torch.cos(2 * math.pi * (x + y)))


def simulate(
    initial_BCHW: torch.Tensor,
    viscosity_B: torch.Tensor,
    snapshots: int,
    interval: float,
    settings: NavierStokes | None = None,
    force_HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Vorticity at times 0, interval, ..., (snapshots - 1) interval: [B, T, 1, H, W].

    Waves from 1/3 of the grid up, and the mean, are removed from the initial field (and so from the first snapshot).

    Args:
        initial_BCHW: vorticity at points (i side / H, j side / W), float32 or float64.
        viscosity_B: nu > 0 of each trajectory.
        force_HW: the force f, in place of that of the settings.

    Raises:
        UserError: an argument has a wrong shape or value, see `checks.require_input`.
        DivergedError: a trajectory is not finite, or too fast for the step; the message names it.
    """
    settings = settings or NavierStokes()
    viscosity_B = require_input(initial_BCHW, 1, viscosity_B, "viscosity", snapshots, interval)
    if len(initial_BCHW) == 1:
        # FFTs of a single field and of several fields round differently.
        pair, both_B = initial_BCHW.expand(2, -1, -1, -1), viscosity_B.expand(2)
        return simulate(pair, both_B, snapshots, interval, settings, force_HW)[:1]
    count = substeps(interval, settings.step)
    height, width = (int(n) for n in initial_BCHW.shape[-2:])
    ky = 2 * math.pi / settings.side * torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
    kx = 2 * math.pi / settings.side * torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)
    k2 = kx**2 + ky**2
    kept = _kept(height, width)
    inverse_k2 = torch.where(k2 > 0, 1 / k2, torch.zeros_like(k2))
    factors = coefficients(-viscosity_B.double().cpu()[:, None, None] * k2, interval / count, initial_BCHW)
    complex_type = torch.complex64 if initial_BCHW.dtype == torch.float32 else torch.complex128

    def as_factor(factor: torch.Tensor) -> torch.Tensor:
        return factor.to(initial_BCHW.device, complex_type)

    velocity_x, velocity_y = as_factor(1j * ky * inverse_k2), as_factor(-1j * kx * inverse_k2)
    along_x, along_y = as_factor(-1j * kx * kept), as_factor(-1j * ky * kept)
    force = forcing(settings, height, width) if force_HW is None else force_HW.double().cpu()
    force_series = as_factor(torch.fft.rfft2(force) * kept)

    def to_grid(series: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(series, s=(height, width))

    longest_wave = max(float((kx * kept).max()), float((ky * kept).max()))

    def require_stable(series: torch.Tensor, time: float) -> None:
        u, v = (to_grid(factor * series).abs().amax((-2, -1)) for factor in (velocity_x, velocity_y))
        fastest_B = u + v
        require_finite(fastest_B[:, None, None, None], time, "give the settings a smaller step")
        longest_B = COURANT / (longest_wave * fastest_B)
        bad = first_bad(longest_B >= interval / count)
        if bad is not None:
            raise DivergedError(
                f"trajectory {bad} of {len(series)} is too fast at time {time:g} for steps of {interval / count:g}: "
                f"give the settings a step of at most {longest_B[bad].item():.2g}"
            )

    def nonlinear(series: torch.Tensor) -> torch.Tensor:
        w = to_grid(series)
        flux_x = torch.fft.rfft2(to_grid(velocity_x * series) * w)
        flux_y = torch.fft.rfft2(to_grid(velocity_y * series) * w)
        return along_x * flux_x + along_y * flux_y + force_series

    series = torch.fft.rfft2(initial_BCHW[:, 0]) * as_factor(kept.to(torch.float64))
    require_stable(series, 0.0)
    fields = [to_grid(series)]
    for snapshot in range(1, snapshots):
        for _ in range(count):
            series = advance(series, nonlinear, factors)
        require_stable(series, snapshot * interval)
        fields.append(to_grid(series))
    return torch.stack(fields, 1)[:, :, None]


def _kept(height: int, width: int) -> torch.Tensor:
    """Mask of the waves below a third of the grid, except the mean: their products alias only into removed waves."""
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64).abs()[:, None]
    columns = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)
    return (3 * rows < height) & (3 * columns < width) & (rows + columns > 0)
