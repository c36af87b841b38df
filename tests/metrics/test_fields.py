from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.metrics import fields as metrics

SHAPE = (8, 12, 10)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(n: int, mode: int) -> torch.Tensor:
    """cos(2 pi mode x / n) on an n^3 box, varying along x only."""
    x = torch.arange(n, dtype=torch.float64) * (2 * math.pi * mode / n)
    return x.cos()[:, None, None].expand(n, n, n).clone()


seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=20, deadline=None)


@few
@given(seed=seeds, offset=st.floats(-5, 5), scale=st.floats(0.01, 10))
def test_the_spatial_mean_scores_a_vrmse_of_one(seed: int, offset: float, scale: float) -> None:
    true = noise(seed, 2, 3, *SHAPE) * scale + offset
    mean = true.mean((-3, -2, -1), keepdim=True).expand_as(true)
    assert torch.allclose(metrics.vrmse(mean, true), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(
        metrics.vrmse(mean, true, per_component=True), torch.ones(2, 3, dtype=torch.float64), atol=1e-6
    )


@few
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_errors_are_zero_for_the_truth_and_do_not_depend_on_units(seed: int, scale: float) -> None:
    true, pred = noise(seed, 3, *SHAPE), noise(seed + 1, 3, *SHAPE)
    for measure in (metrics.vrmse, metrics.nrmse, metrics.band_errors):
        assert measure(true, true).abs().max() == 0
        assert torch.allclose(measure(pred * scale, true * scale), measure(pred, true), rtol=1e-6)


def test_vrmse_by_hand() -> None:
    # Two components: t = (+-1, +-3) in halves of the box, p = t + (1, 0): error 1, variance 1 + 9.
    half = torch.ones(4, 4, 4, dtype=torch.float64)
    half[:2] = -1
    true = torch.stack([half, 3 * half])
    pred = true + torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    assert metrics.vrmse(pred, true).item() == pytest.approx(math.sqrt(1 / 10))
    assert metrics.vrmse(pred, true, per_component=True).tolist() == pytest.approx([1.0, 0.0])
    assert metrics.nrmse(pred, true).item() == pytest.approx(math.sqrt(1 / 10))
    assert metrics.nrmse(pred, true + 10).item() < 1


def test_vrmse_in_lattice_units_is_not_dominated_by_eps() -> None:
    pressure = noise(0, 1, *SHAPE) * 1e-4  # variance 1e-8, a tenth of the_well's eps
    assert metrics.vrmse(torch.zeros_like(pressure), pressure).item() == pytest.approx(1.0, rel=1e-2)


def test_a_scalar_field_needs_no_component_axis_and_shapes_must_agree() -> None:
    p, t = noise(0, *SHAPE), noise(1, *SHAPE)
    assert metrics.vrmse(p, t).shape == ()
    assert metrics.vrmse(p, t) == metrics.vrmse(p[None], t[None])
    with pytest.raises(ValueError, match="different shapes"):
        metrics.vrmse(p, t[:4])


@few
@given(seed=seeds, components=st.sampled_from([1, 3]), offset=st.floats(-2, 2))
def test_spectrum_keeps_the_energy(seed: int, components: int, offset: float) -> None:
    u = noise(seed, components, *SHAPE) + offset
    k, energy = metrics.energy_spectrum(u)
    assert k.shape == energy.shape
    assert k[0] == 0
    assert bool((energy >= 0).all())
    assert energy.sum().item() == pytest.approx(u.square().sum(0).mean().item() / 2, rel=1e-9)


@pytest.mark.parametrize("mode", [0, 1, 3, 8])
def test_one_wave_lands_in_its_shell(mode: int) -> None:
    n = 16
    k, energy = metrics.energy_spectrum(wave(n, mode))
    expected = torch.zeros_like(energy)
    expected[mode] = 0.5 * (1.0 if mode in (0, n // 2) else 0.5)  # half the mean square; cos is +-1 at mode 0 and n/2
    assert torch.allclose(energy, expected, atol=1e-12)
    assert k[mode].item() == pytest.approx(2 * math.pi * mode / n)


def test_spectrum_of_a_long_box_uses_its_longest_side() -> None:
    x = torch.arange(16, dtype=torch.float64) * (2 * math.pi * 2 / 16)
    u = x.sin()[:, None, None].expand(16, 8, 8)
    _, energy = metrics.energy_spectrum(u)
    assert energy.argmax() == 2


def test_band_errors_by_hand() -> None:
    n = 32
    edges = metrics.band_edges((n, n, n))
    low, mid, high = 1, 5, 14  # 2 pi / 32 times these: 0.20, 0.98, 2.75 against edges near 0.59 and 1.79
    assert edges[0] == 0
    assert 2 * math.pi * low / n < edges[1] < 2 * math.pi * mid / n < edges[2] < 2 * math.pi * high / n
    true = wave(n, low) + wave(n, mid) + wave(n, high)
    pred = wave(n, low) + 0.5 * wave(n, mid) - wave(n, high)
    assert metrics.band_errors(pred, true).tolist() == pytest.approx([0.0, 0.25, 4.0], abs=1e-12)
    assert metrics.band_errors(torch.zeros_like(true), true).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_band_errors_cover_every_mode_once() -> None:
    pred, true = noise(0, 2, 3, *SHAPE), noise(1, 2, 3, *SHAPE)
    assert metrics.band_errors(pred, true).shape == (2, 3)
    assert torch.allclose(metrics.band_errors(pred, true, bands=1)[:, 0], metrics.nrmse(pred, true) ** 2)


def test_divergence_report_by_hand() -> None:
    u = torch.zeros(3, 4, 4, 4)
    u[0], u[1] = 3.0, 4.0
    div = torch.full((4, 4, 4), 0.1)
    div[:2] = -0.1
    found = metrics.divergence_report(div, u, spacing=2.0)
    assert found == pytest.approx({"rms_relative": 2 * 0.1 / 5, "rms": 0.1, "max": 0.1})
    assert metrics.divergence_report(div * 0, u * 0, 1.0)["rms_relative"] == 0
    assert metrics.divergence_report(div, u * 0, 1.0)["rms_relative"] == math.inf
    with pytest.raises(ValueError, match="does not belong"):
        metrics.divergence_report(div, u[:2], 1.0)
