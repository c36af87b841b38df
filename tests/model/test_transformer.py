"""The latent transformer: positions, residual form, patches, routing records, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.errors import UserError
from shodh_moe.model import LatentTransformer
from shodh_moe.model.attention import axial_rotary, rotate
from shodh_moe.model.router import Router
from shodh_moe.model.transformer import patchify, unpatchify
from shodh_moe.parallel import ExpertParallel

SMALL = ModelConfig(dim=24, depth=2, heads=2, moe=MoEConfig(expert_hidden=16))


def _model(config: ModelConfig = SMALL, seed: int = 0) -> LatentTransformer:
    return LatentTransformer(config, latent_channels=5, latent_grid=[4, 4, 2], seed=seed, ep=ExpertParallel())


def _inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, 5, 4, 4, 2, generator=g), torch.randn(batch, 5, 4, 4, 2, generator=g)


def test_before_training_the_model_is_persistence():
    history, geometry = _inputs()
    assert torch.equal(_model()(history, geometry).latent_BCxyz, history[:, -1])


def test_every_parameter_gets_a_gradient():
    """Above all the router, which learns only through the gate that scales its expert's output."""
    model = _model()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    out = model(*_inputs())
    out.latent_BCxyz.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_routing_counts_every_token_of_every_layer():
    out = _model()(*_inputs(batch=3))
    assert len(out.routing) == 2
    assert all(layer.expert_N.shape == (3 * 32,) for layer in out.routing)


def test_training_drops_over_capacity_and_evaluation_drops_nothing():
    config = SMALL.model_copy(update={"moe": MoEConfig(expert_hidden=16, capacity_factor=0.5, min_capacity=1)})
    model = _model(config)
    assert not all(layer.kept_N.all() for layer in model(*_inputs()).routing)
    assert all(layer.kept_N.all() for layer in model.eval()(*_inputs()).routing)


def test_patches_turn_back():
    x = torch.randn(2, 5, 4, 4, 2)
    assert torch.equal(unpatchify(patchify(x, 2), 2, x.shape), x)
    # token 1 of a patch-1 grid is the neighbour along the last axis
    assert torch.equal(patchify(x, 1)[:, 1], x[:, :, 0, 0, 1])


def test_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(UserError, match=r"not divisible by model\.patch 4"):
        _model(SMALL.model_copy(update={"patch": 4}))


def test_attention_scores_depend_on_relative_position_alone():
    angles = axial_rotary([3, 3, 3], head_width=24)
    q, k = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)

    def score(a: int, b: int) -> float:
        turned_q = rotate(q[None, None, None], angles[a : a + 1])
        turned_k = rotate(k[None, None, None], angles[b : b + 1])
        return float((turned_q * turned_k).sum())

    assert score(0, 13) == pytest.approx(score(13, 26))  # (0,0,0)->(1,1,1) and (1,1,1)->(2,2,2)
    assert score(0, 1) != pytest.approx(score(0, 3))  # along z and along y are different


def test_same_seed_same_weights():
    a, b, c = _model(seed=0), _model(seed=0), _model(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].moe.experts.down_LFD, c.blocks[0].moe.experts.down_LFD)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_router_kinds(kind):
    router = Router(8, 3, RouterConfig(kind=kind, temperature=0.1))
    x = torch.randn(10, 8)
    once, twice = (router(scale * x, 10, "position") for scale in (1, 2))
    assert torch.equal(once.expert_N, twice.expert_N)
    if kind == "cosine":  # a cosine does not see the length of the token, and the logits are at most 1 / tau
        torch.testing.assert_close(twice.gate_N, once.gate_N)
        assert once.z_loss.sqrt() <= 10 + math.log(3)
    else:
        logits = x @ router.projection.weight.T
        torch.testing.assert_close(twice.gate_N, torch.softmax(2 * logits, 1).amax(1))


def test_router_temperature_is_floored():
    router = Router(8, 3, RouterConfig(temperature=0.1, min_temperature=0.05))
    router.log_temperature.data.fill_(-100.0)
    assert router(torch.randn(10, 8), 10, "position").z_loss.sqrt() <= 20 + math.log(3)
