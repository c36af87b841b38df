"""Folding voxels into channels and back, and how encoder and decoder treat solids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.runs.live_bytes import LiveBytes
from shodh_moe.tokenizer.autoencoder import Decoder, Encoder, WrappingConv, depth_to_space, space_to_depth
from shodh_moe.tokenizer.lapped import overlap, separate

CELLS = st.integers(1, 3)


@settings(max_examples=30, deadline=None)
@given(channels=CELLS, grid=st.tuples(CELLS, CELLS, CELLS), factor=st.sampled_from([1, 2, 4, 8]))
def test_folding_and_unfolding_are_inverse(channels: int, grid: tuple[int, int, int], factor: int) -> None:
    fine = torch.randn(2, channels, *(size * factor for size in grid))
    coarse = space_to_depth(fine, factor)
    assert coarse.shape == (2, channels * factor**3, *grid)
    assert torch.equal(depth_to_space(coarse, factor), fine)


def test_folding_keeps_each_cube_together() -> None:
    x = torch.arange(4**3, dtype=torch.float32).view(1, 1, 4, 4, 4)
    coarse = space_to_depth(x, 2)
    assert sorted(coarse[0, :, 1, 0, 1].tolist()) == sorted(x[0, 0, 2:4, 0:2, 2:4].flatten().tolist())


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 8, 24)])
def test_shapes(grid: tuple[int, int, int]) -> None:
    fields, solid = torch.randn(2, 5, *grid), (torch.rand(2, 1, *grid) < 0.3).float()
    z = Encoder([4, 6, 8], 1, 7)(fields)
    assert z.shape == (2, 7, *(size // 8 for size in grid))
    velocity, pressure = Decoder([4, 6, 8], 1, 7)(z, solid)
    assert velocity.shape == (2, 3, *grid)
    assert pressure.shape == (2, 1, *grid)


def test_the_decoders_output_is_zero_exactly_in_solids() -> None:
    solid = torch.zeros(2, 1, 8, 8, 8)
    solid[..., :3] = 1
    velocity, pressure = Decoder([4, 4, 4], 1, 3).eval()(torch.randn(2, 3, 1, 1, 1), solid)
    for field in (velocity, pressure):
        assert (field[..., :3] == 0).all()
        assert (field[..., 3:] != 0).all()


@pytest.mark.parametrize("refine", [0, 5])
def test_before_training_the_correction_is_zero_and_the_model_linear(refine: int) -> None:
    encoder, decoder = Encoder([4, 4, 4], 1, 3), Decoder([4, 4, 4], 1, 3, refine=refine)
    x, z, fluid = torch.randn(1, 5, 16, 8, 8), torch.randn(1, 3, 2, 1, 1), torch.zeros(1, 1, 16, 8, 8)
    assert torch.equal(encoder(x), encoder.project(x[:, :4]))
    assert torch.equal(torch.cat(decoder(z, fluid), dim=1), decoder.patches(z))


def test_overlapping_patches_are_patches_of_the_turned_field() -> None:
    encoder, decoder = Encoder([4, 4, 4], 1, 3, overlapping=True), Decoder([4, 4, 4], 1, 3, overlapping=True)
    x, z, fluid = torch.randn(1, 5, 16, 8, 8), torch.randn(1, 3, 2, 1, 1), torch.zeros(1, 1, 16, 8, 8)
    assert torch.equal(encoder(x), encoder.project(overlap(x[:, :4])))
    assert torch.equal(torch.cat(decoder(z, fluid), dim=1), separate(decoder.patches(z)))


def test_a_refined_field_is_zero_in_solids_and_differs_in_the_fluid() -> None:
    decoder = Decoder([4, 4, 4], 1, 3, refine=5)
    z, solid = torch.randn(2, 3, 2, 1, 1), torch.zeros(2, 1, 16, 8, 8)
    solid[..., :3] = 1
    before = torch.cat(decoder(z, solid), dim=1)
    for parameter in decoder.refinement.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    after = torch.cat(decoder(z, solid), dim=1)
    assert (after[..., :3] == 0).all()
    assert (after[..., 3:] != before[..., 3:]).all()


@pytest.mark.parametrize("refine", [0, 5])
def test_every_parameter_can_learn(refine: int) -> None:
    """A correction that starts at zero must be able to learn."""
    encoder, decoder = Encoder([4, 4, 4], 1, 3), Decoder([4, 4, 4], 1, 3, refine=refine)
    parameters = [*encoder.named_parameters(), *decoder.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=1.0)
    x, solid = torch.randn(2, 5, 16, 8, 8), (torch.rand(2, 1, 16, 8, 8) < 0.3).float()
    for _ in range(3):  # the zero layers change first, then the layers before them
        optimizer.zero_grad()
        velocity, pressure = decoder(encoder(x), solid)
        (velocity.square().mean() + pressure.square().mean() + velocity.mean()).backward()
        seen = {name: bool(p.grad is not None and p.grad.abs().sum() > 0) for name, p in parameters}
        optimizer.step()
    assert [name for name, moved in seen.items() if not moved] == []


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputed_stages_give_the_same_gradients_with_less_memory(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder([4, 6, 8], 2, 7), Decoder([4, 6, 8], 2, 7)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    fields, solid = torch.randn(2, 5, 24, 8, 40), (torch.rand(2, 1, 24, 8, 40) < 0.3).float()

    def step(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        encoder.checkpointing = decoder.checkpointing = checkpointing
        with LiveBytes(parameters) as live, torch.autocast("cpu", precision, enabled=precision != torch.float32):
            velocity, pressure = decoder(encoder(fields), solid)
            loss = velocity.square().mean() + pressure.square().mean()
            del velocity, pressure
            kept = live.now
        return list(torch.autograd.grad(loss, parameters)), kept

    (plain, kept), (recomputed, kept_recomputed) = step(False), step(True)
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert kept_recomputed < 0.6 * kept


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (4, 1, 6)])
def test_the_convolution_wraps_around(grid: tuple[int, int, int]) -> None:
    """Compare with torch's circular padding in float64, with gradients."""
    conv = WrappingConv(3, 2).double()
    plain = torch.nn.Conv3d(3, 2, 3, padding=1, padding_mode="circular").double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    expected, found = plain(x), conv(x)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    expected_gradient, gradient = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, found))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(conv, (x,))
