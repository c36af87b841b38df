"""FNO and DPOT: symmetries, grids, gradients, precision, parameters, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.operators import DPOT_SIZES, FNO_SIZES, DPOT2d, DPOTSize, FNO2d, FNOSize
from shodh_moe.operators.dpot import FourierAttention

Make = Callable[..., FNO2d | DPOT2d]


def fno(**options: Any) -> FNO2d:
    return FNO2d(FNOSize(width=6, modes=3, blocks=2), 2, **options)


def dpot(**options: Any) -> DPOT2d:
    return DPOT2d(DPOTSize(width=8, patch=2, blocks=2, heads=2, modes=3, head_width=4), 2, **options)


both = pytest.mark.parametrize("make", [fno, dpot])


def awake(model: nn.Module) -> Any:
    """Make a network with random weights; a new network predicts no change."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def fields(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def smooth(n: int) -> Tensor:
    """Return the same waves on a grid of n^2: [1, 1, 2, n, n]."""
    x = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    y, x = torch.meshgrid(x, x, indexing="ij")
    return torch.stack([(x + 2 * y).cos(), 0.5 * (2 * x - y).sin() + 0.2])[None, None]


@both
def test_before_training_nothing_changes(make: Make) -> None:
    frames = fields(3, 2, 2, 8, 8)
    model = make(history=2, conditions=1)
    assert torch.equal(model(frames, torch.ones(3)), frames[:, -1])


@both
@pytest.mark.parametrize(
    "options", [{}, {"coordinates": "cells"}, {"coordinates": "waves"}, {"conditions": 2}], ids=str
)
def test_gradients(make: Make, options: dict[str, Any]) -> None:
    model = awake(make(history=2, **options).double())
    frames = fields(2, 2, 2, 8, 6, dtype=torch.float64).requires_grad_()
    condition = fields(2, 2, dtype=torch.float64).requires_grad_() if "conditions" in options else None
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(frames: Tensor, condition: Tensor | None, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (frames, condition))

    assert torch.autograd.gradcheck(run, (frames, condition, *parameters), fast_mode=True)
    model(frames, condition).square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_a_shifted_field_gives_the_shifted_frame() -> None:
    frames, shift = fields(2, 1, 2, 12, 8), (3, 5)
    moved = frames.roll(shift, (-2, -1))
    plain = awake(fno())
    torch.testing.assert_close(plain(moved), plain(frames).roll(shift, (-2, -1)), rtol=0, atol=2e-5)
    placed = awake(fno(coordinates="cells"))
    assert (placed(moved) - placed(frames).roll(shift, (-2, -1))).abs().max() > 1e-2


def test_padding_breaks_the_period() -> None:
    frames = fields(2, 1, 2, 12, 8)
    padded = awake(fno(padding=0.25))
    assert (padded(frames.roll(3, -1)) - padded(frames).roll(3, -1)).abs().max() > 1e-2
    assert padded(frames).shape == (2, 2, 12, 8)


def test_a_finer_grid_gives_the_same_field() -> None:
    model = awake(FNO2d(FNOSize(width=8, modes=6), 2)).double()
    coarse, fine = model(smooth(48)), model(smooth(96))
    change = (coarse - smooth(48)[:, -1]).abs().max()
    assert change > 0.1
    assert (fine[..., ::2, ::2] - coarse).abs().max() < 1e-3 * change


def test_a_patch_keeps_its_place() -> None:
    """Without attention, patches are independent; an error in the order of cells would affect other patches."""
    model = awake(dpot(history=2, coordinates="cells"))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.weight2.zero_()
            block.attention.bias2.zero_()
    frames = fields(1, 2, 2, 12, 8).requires_grad_()
    model(frames)[..., 4:6, 6:8].sum().backward()
    touched = frames.grad.abs().sum((0, 1, 2)) > 0
    expected = torch.zeros(12, 8, dtype=torch.bool)
    expected[4:6, 6:8] = True
    assert torch.equal(touched, expected)


def test_fourier_attention_equals_the_orthonormal_fft() -> None:
    attention = awake(FourierAttention(width=8, heads=2, modes=32)).double()
    x = fields(2, 6, 5, 8, dtype=torch.float64)
    weight1, weight2, bias1, bias2 = (
        torch.view_as_complex(p.detach())
        for p in (attention.weight1, attention.weight2, attention.bias1, attention.bias2)
    )
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").unflatten(-1, (2, 4))
    hidden = torch.einsum("bpqhi,hij->bpqhj", spectrum, weight1) + bias1[:, 0]
    hidden = torch.complex(nn.functional.gelu(hidden.real), nn.functional.gelu(hidden.imag))
    mixed = (torch.einsum("bpqhi,hij->bpqhj", hidden, weight2) + bias2[:, 0]).flatten(-2)
    columns = torch.fft.ifft(mixed, dim=1, norm="ortho")
    columns[:, :, 0] = columns[:, :, 0].real + 0j
    expected = torch.fft.irfft(columns, n=5, dim=2, norm="ortho")
    torch.testing.assert_close(attention(x), expected)


@both
def test_the_seed_determines_only_the_weights(make: Make) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = make(seed=1).state_dict(), make(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@both
def test_weights_are_real_tensors_that_safetensors_can_store(make: Make) -> None:
    model = awake(make(conditions=1))
    state = model.state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    assert {value.dtype for value in state.values()} == {torch.float32}
    copy = make(conditions=1)
    copy.load_state_dict(load(save(state)))
    frames, condition = fields(2, 1, 2, 8, 8), fields(2)
    assert torch.equal(copy(frames, condition), model(frames, condition))


@both
def test_bfloat16_is_close_to_float32(make: Make) -> None:
    """Under autocast, and with weights in bfloat16; the transform stays in float32 in both."""
    model, frames = awake(make(history=2, coordinates="cells")), fields(2, 2, 2, 8, 8)
    change = model(frames) - frames[:, -1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(frames)
    mixed.square().mean().backward()
    half = model.to(torch.bfloat16)(frames)
    for result in (mixed, half):
        error = result - frames[:, -1] - change
        assert result.dtype == torch.float32
        assert 0 < error.norm() < 0.05 * change.norm()


@both
def test_the_physical_parameter_counts_and_is_checked(make: Make) -> None:
    frames, model = fields(2, 1, 2, 8, 8, dtype=torch.float64), awake(make(conditions=2)).double()
    condition = fields(2, 2)
    result = model(frames, condition)
    torch.testing.assert_close(model(frames[:1], condition[:1]), result[:1])  # each sample has its own condition
    assert (model(frames, condition.flip(0)) - result).abs().max() > 1e-2
    with pytest.raises(ValueError, match="with physical parameters"):
        model(frames)
    with pytest.raises(ValueError, match="2 parameters; 1 were given"):
        model(frames, condition[:, 0])
    with pytest.raises(ValueError, match="without physical parameters"):
        make()(frames, condition)


def test_unsuitable_grids_are_refused() -> None:
    with pytest.raises(UserError, match="8 x 5 is too coarse for an FNO with 3 modes: take at least 6"):
        fno()(fields(1, 1, 2, 8, 5))
    with pytest.raises(UserError, match="8 x 5 cannot be cut into patches of 2 x 2"):
        dpot()(fields(1, 1, 2, 8, 5))


FNO_PARAMETERS = (925370, 5322866, 16802626, 40999442, 335546, 1055138, 2570122)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        *((("fno", name), count) for name, count in zip(FNO_SIZES, FNO_PARAMETERS, strict=True)),
        *((("dpot", name), count) for name, count in zip(DPOT_SIZES, (288674, 4545698), strict=True)),
    ],
    ids=str,
)
def test_number_of_parameters(model: tuple[str, str], count: int) -> None:
    kind, name = model
    with torch.device("meta"):
        network = FNO2d(FNO_SIZES[name], 2) if kind == "fno" else DPOT2d(DPOT_SIZES[name], 2)
    assert sum(p.numel() for p in network.parameters()) == count
