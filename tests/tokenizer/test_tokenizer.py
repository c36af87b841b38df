"""The tokenizer: shapes, an exactly divergence-free velocity, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.config import TokenizerConfig
from shodh_moe.kernels import divergence
from shodh_moe.kernels.differentiation import OPERATORS
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import CONFIG
from tests.tokenizer.helpers import rms

GRIDS = [[16, 16, 16], [8, 16, 24]]


def random_tokenizer(grid: list[int], operator: str = "spectral", walls: str = "none", **settings: Any) -> Tokenizer:
    """Make a tokenizer like a trained one: no weight is zero, and every statistic differs from its initial value."""
    torch.manual_seed(0)
    settings = {**CONFIG["tokenizer"], "operator": operator, "walls": walls, **settings}
    config = TokenizerConfig.model_validate(settings)
    tokenizer = Tokenizer(config, grid)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in tokenizer.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return tokenizer.eval()


def solid(grid: list[int], batch: int) -> Tensor:
    return (torch.rand(batch, 1, *grid, generator=torch.Generator().manual_seed(3)) < 0.3).float()


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
def test_encode_and_decode_shapes(grid: list[int]) -> None:
    tokenizer = random_tokenizer(grid)
    fields = torch.cat([torch.randn(2, 4, *grid), solid(grid, 2)], dim=1)
    z = tokenizer.encode(fields)
    assert z.shape == (2, 16, *tokenizer.latent_grid)
    assert tokenizer.latent_grid == [size // 8 for size in grid]
    assert tokenizer.encode_geometry(fields[:, 4:]).shape == z.shape
    flow = tokenizer.decode(z, fields[:, 4:])
    assert flow.velocity_B3XYZ.shape == (2, 3, *grid)
    assert flow.pressure_B1XYZ.shape == (2, 1, *grid)


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (None, 1e-5)])
def test_the_decoded_velocity_is_divergence_free(
    grid: list[int], operator: str, dtype: torch.dtype | None, most: float
) -> None:
    tokenizer = random_tokenizer(grid, operator)
    mask = solid(grid, 3)
    velocity = tokenizer.decode(torch.randn(3, 16, *tokenizer.latent_grid), mask, dtype).conserved_B3XYZ
    assert velocity.dtype == (dtype or torch.float32)
    assert rms(velocity) > 0.01
    assert rms(divergence(velocity.double(), operator)) <= most * rms(velocity)
    # The raw output of the network is far from divergence-free.
    raw, _ = tokenizer.decoder(torch.randn(3, 16, *tokenizer.latent_grid), mask)
    assert rms(divergence(raw.double(), operator)) > 0.1 * rms(raw)


@pytest.mark.parametrize("walls", ["ramp", "exact"])
@pytest.mark.parametrize("operator", ["staggered", "central2", "central4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_walls_the_velocity_is_also_exactly_zero_in_solids(walls: str, operator: str, dtype: torch.dtype) -> None:
    """With ``bfloat16``, latents come from autocast; velocity and gradient are made conservative in float32."""
    grid = [16, 8, 16]
    tokenizer = random_tokenizer(grid, operator, walls)
    mask = torch.zeros(2, 1, *grid)
    mask[:, :, 2:5, 1:3, :6] = mask[:1, :, :, :, :2] = 1  # a block; a bed
    low = dtype == torch.bfloat16
    z = torch.randn(2, 16, *tokenizer.latent_grid, dtype=dtype if low else torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        flow = tokenizer.decode(z, mask, None if low else dtype)
        (gradient,) = torch.autograd.grad(flow.velocity_B3XYZ.square().sum(), z)
    assert flow.conserved_B3XYZ.dtype == (torch.float32 if low else dtype)
    assert (flow.velocity_B3XYZ[mask.expand(-1, 3, -1, -1, -1) == 1] == 0).all()
    for one in flow.conserved_B3XYZ.detach():
        most = 1e-13 if dtype == torch.float64 else 1e-5
        assert rms(one) > 0.01
        assert rms(divergence(one[None].double(), operator)) <= most * rms(one)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


@torch.no_grad()
@pytest.mark.parametrize("walls", ["none", "exact"])
def test_overlapping_refined_and_scaled_decoders_conserve_too(walls: str) -> None:
    settings = {"patches": "overlapping", "refine": 4, "scales": "sample"}
    tokenizer, mask = random_tokenizer(GRIDS[1], "staggered", walls, **settings), solid(GRIDS[1], 2)
    velocity = tokenizer.decode(torch.randn(2, 16, *tokenizer.latent_grid), mask, torch.float64).conserved_B3XYZ
    assert rms(velocity) > 0.01
    assert rms(divergence(velocity, "staggered")) <= 1e-13 * rms(velocity)


def scaled_tokenizer() -> Tokenizer:
    """With scales by sample, and latents that are normalised as after training."""
    tokenizer = random_tokenizer(GRIDS[1], scales="sample")
    tokenizer.velocity_rms.fill_(2.0)
    tokenizer.pressure_rms.fill_(4.0)
    return tokenizer


@torch.no_grad()
def test_with_scales_by_sample_a_flow_decodes_in_proportion() -> None:
    """Velocity times 10 and pressure divided by 100 decode to just that, with the same latents but the last two."""
    tokenizer, mask = scaled_tokenizer(), solid(GRIDS[1], 2)
    fields = torch.cat([torch.randn(2, 4, *GRIDS[1]), mask], dim=1)
    factors = torch.tensor([10.0] * 3 + [0.01] + [1.0]).view(5, 1, 1, 1)
    plain, other = tokenizer.encode(fields), tokenizer.encode(fields * factors)
    assert plain.shape == (2, 16, *tokenizer.latent_grid)
    torch.testing.assert_close(other[:, :-2], plain[:, :-2], rtol=1e-4, atol=1e-5)
    one, two = tokenizer.decode(plain, mask), tokenizer.decode(other, mask)
    torch.testing.assert_close(two.velocity_B3XYZ, 10 * one.velocity_B3XYZ, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(two.conserved_B3XYZ, 10 * one.conserved_B3XYZ, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(two.pressure_B1XYZ, 0.01 * one.pressure_B1XYZ, rtol=1e-3, atol=1e-5)
    normal = tokenizer.normalise(fields)
    torch.testing.assert_close(normal[:, :3].square().mean((1, 2, 3, 4)), torch.ones(2))
    torch.testing.assert_close(normal[:, 3:4].square().mean((1, 2, 3, 4)), torch.ones(2))


@torch.no_grad()
def test_the_last_two_latents_are_the_logarithms_of_the_scales() -> None:
    tokenizer, fields = scaled_tokenizer(), torch.cat([torch.randn(1, 4, *GRIDS[1]), solid(GRIDS[1], 1)], dim=1)
    z_raw, _ = tokenizer.encode_raw(fields)
    ratios = [rms(fields[:, :3]) / 2, rms(fields[:, 3:4]) / 4]
    torch.testing.assert_close(z_raw[0, -2:].flatten(1), torch.tensor(ratios).log()[:, None].expand(-1, 6))
    # Predicted ones may differ from cell to cell.
    mask, wavy = fields[:, 4:], z_raw.clone()
    wavy[:, -2:, 0] += 0.1
    wavy[:, -2:, :, 0] += 0.2
    wavy[:, -2:, :, 1] -= 0.2
    z, z_wavy = ((raw - column(tokenizer.latent_mean_C)) / column(tokenizer.latent_std_C) for raw in (z_raw, wavy))
    expected = tokenizer.decode(z, mask).pressure_B1XYZ * 1.1051709
    torch.testing.assert_close(tokenizer.decode(z_wavy, mask).pressure_B1XYZ, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e9])
def test_a_flow_at_rest_or_out_of_range_stays_finite(factor: float) -> None:
    tokenizer, mask = scaled_tokenizer(), solid(GRIDS[1], 1)
    fields = torch.cat([factor * torch.randn(1, 4, *GRIDS[1]), mask], dim=1)
    z = tokenizer.encode(fields)
    assert z.isfinite().all()
    z[:, -2:] *= 1e6  # a prediction that went astray
    for field in tokenizer.decode(z, mask):
        assert field.isfinite().all()


def column(x_C: Tensor) -> Tensor:
    return x_C[:, None, None, None]


def test_a_tokenizer_of_an_older_version_loads_and_decodes_as_before(tmp_path: Path) -> None:
    """Its file states no patches, refinement and scales."""
    tokenizer = random_tokenizer(GRIDS[0])
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / "tokenizer.json").read_text())
    for key in ("patches", "refine", "scales"):
        del meta["config"][key]
    (tmp_path / "tokenizer.json").write_text(json.dumps(meta))
    loaded, z, mask = load_tokenizer(tmp_path), torch.randn(1, 16, 2, 2, 2), solid(GRIDS[0], 1)
    assert torch.equal(loaded.decode(z, mask).pressure_B1XYZ, tokenizer.decode(z, mask).pressure_B1XYZ)
    assert not any("refine" in name for name in loaded.state_dict())


@torch.no_grad()
def test_the_mean_flow_passes_through() -> None:
    """A periodic curl has no mean, so the decoder adds the mean of the raw velocity."""
    tokenizer = random_tokenizer(GRIDS[0])
    z, mask = torch.randn(2, 16, 2, 2, 2), solid(GRIDS[0], 2)
    raw, _ = tokenizer.decoder(z, mask)
    flow = tokenizer.decode_normalised(z, mask, torch.float64)
    torch.testing.assert_close(flow.velocity_B3XYZ.mean((2, 3, 4)), raw.double().mean((2, 3, 4)), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_pressure_is_exactly_zero_in_solids() -> None:
    tokenizer, mask = random_tokenizer(GRIDS[0]), solid(GRIDS[0], 2)
    pressure = tokenizer.decode(torch.randn(2, 16, 2, 2, 2), mask, torch.float64).pressure_B1XYZ
    assert (pressure[mask == 1] == 0).all()
    assert (pressure[mask == 0] != 0).all()


@torch.no_grad()
def test_normalisation_has_one_scale_for_velocity_and_one_for_pressure() -> None:
    tokenizer = random_tokenizer(GRIDS[0])
    tokenizer.velocity_rms.fill_(2.0)
    tokenizer.pressure_rms.fill_(4.0)
    normalised = tokenizer.normalise(torch.full((1, 5, 8, 8, 8), 8.0))
    assert normalised[0, :, 0, 0, 0].tolist() == [4.0, 4.0, 4.0, 2.0, 8.0]


@torch.no_grad()
def test_a_loaded_tokenizer_equals_the_saved_one_bit_for_bit(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(GRIDS[1])
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.safetensors"]
    loaded = load_tokenizer(tmp_path)
    assert loaded.grid == GRIDS[1]
    assert loaded.config == tokenizer.config
    assert not loaded.training
    stored = loaded.state_dict()
    assert stored.keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(stored[key], value) for key, value in tokenizer.state_dict().items())
    fields = torch.randn(1, 5, *GRIDS[1])
    assert torch.equal(loaded.encode(fields), tokenizer.encode(fields))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["fields"] == ["velocity", "pressure", "solid"]


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    random_tokenizer(GRIDS[0]).save(tmp_path)
    weights = tmp_path / "tokenizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.safetensors is damaged .* train again"):
        load_tokenizer(tmp_path)
