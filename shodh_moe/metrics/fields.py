"""Errors, spectra and divergence of flow fields: pure functions of tensors, without models or files.

Shapes: a field is ``[..., C, X, Y, Z]``. Leading axes (batch, time) are kept in the result, C holds the components of
one field (3 for a velocity, 1 for a pressure), and a bare ``[X, Y, Z]`` counts as C = 1. Everything is computed in
float64, whatever the input's dtype.

Sources: VRMSE and the spectral bands follow the definitions of The Well (arXiv 2412.00568) as its package computes
them; a function's docstring says where it differs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPACE = (-3, -2, -1)
FIELD = (-4, -3, -2, -1)


def _field(x: Tensor) -> Tensor:
    """[..., C, X, Y, Z] in float64; a bare [X, Y, Z] gains C = 1."""
    if x.ndim < 3:
        raise ValueError(f"a field needs at least the axes [X, Y, Z], not shape {tuple(x.shape)}")
    return (x[None] if x.ndim == 3 else x).double()


def _pair(pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    if pred.shape != true.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and truth {tuple(true.shape)} have different shapes")
    return _field(pred), _field(true)


def vrmse(pred: Tensor, true: Tensor, *, per_component: bool = False, eps: float = 1e-16) -> Tensor:
    """Root mean square error over the spatial standard deviation: predicting the spatial mean scores 1.

        vrmse = sqrt( mean_x |p - t|^2 / (var_x(t) + eps) ),   var_x(t) = mean_x |t - mean_x t|^2

    ``pred``, ``true``: [..., C, X, Y, Z]. By default |.| is the norm over the components, so a velocity gives one
    number: errors and variances of its components are added before the division, and a component that hardly varies
    cannot dominate. Returns [...].

    ``per_component=True`` returns [..., C], each component over its own variance, as the_well's package computes it
    (``the_well.benchmark.metrics.VRMSE``, channel by channel). Two details differ: the variance divides by the number
    of cells n rather than n - 1, so that the mean predictor scores exactly 1; and ``eps`` is far below the_well's 1e-7,
    which suits fields of order one, because a pressure fluctuation in lattice units has a variance near 1e-8.
    """
    pred, true = _pair(pred, true)
    dims = SPACE if per_component else FIELD
    fluctuation = true - true.mean(SPACE, keepdim=True)
    return (((pred - true) ** 2).mean(dims) / ((fluctuation**2).mean(dims) + eps)).sqrt()


def nrmse(pred: Tensor, true: Tensor, *, eps: float = 1e-30) -> Tensor:
    """Relative L2 error ``|p - t|_2 / |t|_2`` over components and cells: [..., C, X, Y, Z] -> [...].

    Predicting zero scores 1. Unlike in `vrmse`, the mean flow is part of the denominator, so a through-flow makes this
    number smaller.
    """
    pred, true = _pair(pred, true)
    return (((pred - true) ** 2).sum(FIELD) / ((true**2).sum(FIELD) + eps)).sqrt()


def wavenumbers(shape: tuple[int, int, int] | torch.Size, device: torch.device | None = None) -> Tensor:
    """Length of the wave vector of every Fourier mode, [X, Y, Z], float64, in radians per cell."""
    k_x, k_y, k_z = (2 * math.pi * torch.fft.fftfreq(n, device=device, dtype=torch.float64) for n in shape)
    return (k_x[:, None, None] ** 2 + k_y[None, :, None] ** 2 + k_z[None, None, :] ** 2).sqrt()


def _mode_power(x: Tensor) -> Tensor:
    """|x_hat|^2 / cells^2 summed over components, [..., X, Y, Z]: its sum over modes is mean_x |x|^2 (Parseval)."""
    cells = math.prod(x.shape[-3:])
    return (torch.fft.fftn(x, dim=SPACE).abs() / cells).square().sum(-4)


def _bin_sums(power: Tensor, index: Tensor, bins: int) -> Tensor:
    """Sum ``power`` [..., X, Y, Z] into [..., bins] by the bin number ``index`` [X, Y, Z] of each mode."""
    flat = power.flatten(-3)
    sums = torch.zeros(*flat.shape[:-1], bins, dtype=flat.dtype, device=flat.device)
    return sums.index_add_(-1, index.flatten(), flat)


def energy_spectrum(u: Tensor) -> tuple[Tensor, Tensor]:
    """Shell-summed spectrum of a field on a periodic box: ``(k [S], E [..., S])``.

        E_s = 1/2 sum_{k in shell s} |u_hat_k|^2,    shell s: |k| nearest to s * k_0,    k_0 = 2 pi / longest side

    ``u``: [..., C, X, Y, Z] (or one scalar [X, Y, Z]). ``k`` = s * k_0 in radians per cell; s = 0 is the mean. The last
    shells lie beyond the Nyquist wave number pi of an axis, in the corners of the wave-number cube. The normalisation
    is Parseval's: ``E.sum(-1) == mean_x |u|^2 / 2`` (kinetic energy per mass for a velocity; for a scalar, half its
    mean square). E is a sum over each shell, not a density: divide by k_0 for dE/dk. A flow with walls is not periodic:
    jumps at the box faces and at solids add a tail at high k.
    """
    u = _field(u)
    k = wavenumbers(u.shape[-3:], u.device)
    k_0 = 2 * math.pi / max(u.shape[-3:])
    shell = (k / k_0).round().long()
    shells = int(shell.max()) + 1
    energy = _bin_sums(_mode_power(u), shell, shells) / 2
    return torch.arange(shells, device=u.device, dtype=torch.float64) * k_0, energy


def band_edges(shape: tuple[int, int, int] | torch.Size, bands: int = 3) -> list[float]:
    """``bands + 1`` edges in radians per cell, equally spaced in log k, the first replaced by 0 (The Well's bins).

    They run from the longest wave of the box, 2 pi / longest side, to the corner of the wave-number cube.
    """
    low, high = math.log(2 * math.pi / max(shape)), math.log(math.pi * math.sqrt(3) + 1e-6)
    return [0.0] + [math.exp(low + (high - low) * i / bands) for i in range(1, bands + 1)]


def band_errors(pred: Tensor, true: Tensor, bands: int = 3, *, eps: float = 1e-30) -> Tensor:
    """Power of the error over power of the truth, per log band of wave number: [..., C, X, Y, Z] -> [..., bands].

        error_b = sum_{k in b} |p_hat_k - t_hat_k|^2 / sum_{k in b} |t_hat_k|^2

    0 is perfect, and predicting zero in a band scores 1. Phases count: a field with the right spectrum in the wrong
    place scores about 2. The bands are `band_edges`; the lowest includes the mean. This is the normalised spectral
    error of the_well's package with the components of a vector taken together. (The ratio of the two spectra, which
    other papers use, ignores phases and is not comparable.)
    """
    pred, true = _pair(pred, true)
    shape = true.shape[-3:]
    inner = torch.tensor(band_edges(shape, bands)[1:-1], dtype=torch.float64, device=true.device)
    index = torch.bucketize(wavenumbers(shape, true.device), inner, right=True)
    return _bin_sums(_mode_power(pred - true), index, bands) / (_bin_sums(_mode_power(true), index, bands) + eps)


def divergence_report(div: Tensor, u: Tensor, spacing: float) -> dict[str, float]:
    """Measure the divergence of a velocity: ``{"rms_relative", "rms", "max"}``.

        rms_relative = spacing * rms(div) / rms(u)     (dimensionless)

    ``div``: [..., X, Y, Z], the divergence of ``u`` [..., 3, X, Y, Z] by the operator under test. The caller must
    report the operator and the dtype: the number means nothing without them. rms(u) is the rms speed, sqrt(mean |u|^2)
    with the three components added. Means and maxima are taken over the whole input.

    Raises:
        ValueError: the shapes of ``div`` and ``u`` do not belong together.
    """
    return pooled_divergence(divergence_moments(div, u)[None], spacing)


def divergence_moments(div: Tensor, u: Tensor) -> Tensor:
    """Mean div^2, mean |u|^2 and max |div| of one snapshot, for `pooled_divergence`: [3], float64.

    Shapes and errors as in `divergence_report`.
    """
    div, u = div.double(), u.double()
    if u.ndim < 4 or u.shape[-4] != 3 or div.shape != u.shape[:-4] + u.shape[-3:]:
        raise ValueError(f"divergence {tuple(div.shape)} does not belong to a velocity {tuple(u.shape)}")
    return torch.stack([div.square().mean(), u.square().sum(-4).mean(), div.abs().max()])


def pooled_divergence(moments_N3: Tensor, spacing: float) -> dict[str, float]:
    """Compute `divergence_report` for N snapshots of equal size, from the `divergence_moments` [N, 3] of each."""
    rms, speed = moments_N3[:, 0].mean().sqrt(), moments_N3[:, 1].mean().sqrt()
    relative = float(spacing * rms / speed) if speed > 0 else (0.0 if rms == 0 else math.inf)
    return {"rms_relative": relative, "rms": float(rms), "max": float(moments_N3[:, 2].max())}
