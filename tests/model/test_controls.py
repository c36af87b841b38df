"""Control models for the mixture of experts: dense blocks, a router that knows the domain, a frozen router."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.parallel import ExpertParallel
from tests.tiny import LAYER


def _model(moe: MoEConfig, seed: int = 0) -> LatentTransformer:
    config = ModelConfig(dim=24, depth=2, heads=2, moe=moe)
    model = LatentTransformer(config, latent_channels=5, seed=seed, ep=ExpertParallel())
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(7))
    return model


def _inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, 5, 4, 4, 2, generator=g), torch.randn(batch, 5, 4, 4, 2, generator=g)


def test_a_dense_block_is_the_sum_of_its_networks_and_routes_nothing():
    model = _model(MoEConfig(num_experts=0, shared_experts=3, expert_hidden=16))
    found = model(*_inputs())
    assert found.routing == []
    assert model.moe_layers == []
    x_ND = torch.randn(10, 24)
    block = model.blocks[0].moe
    torch.testing.assert_close(block(x_ND)[0], sum(expert(x_ND) for expert in block.shared))
    found.latent_BCxyz.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_block_needs_an_expert():
    with pytest.raises(ValidationError, match="needs at least one expert"):
        MoEConfig(num_experts=0, shared_experts=0)


def test_the_oracle_sends_each_sample_to_the_named_expert_with_gate_1():
    model = _model(MoEConfig(**LAYER, num_experts=3, expert_hidden=16, router=RouterConfig(kind="oracle")))
    expert_B = torch.tensor([2, 0, 2, 1])
    context = Context(4, torch.tensor([2, 3, 5, 1]))  # more domains than experts
    for training in (False, True):
        for routing in model.train(training)(*_inputs(), context).routing:
            assert torch.equal(routing.expert_N.view(4, -1), expert_B[:, None].expand(4, 32))
            assert torch.equal(routing.gate_N, torch.ones(128))
            assert routing.z_loss == 0
    assert not list(model.blocks[0].moe.router.parameters())
    with pytest.raises(UserError, match="oracle needs each sample's domain"):
        model(*_inputs())


def test_other_routers_ignore_the_domain():
    model = _model(MoEConfig(**LAYER, expert_hidden=16)).eval()
    with_domains = model(*_inputs(), Context(4, torch.tensor([0, 1, 0, 1]))).latent_BCxyz
    assert torch.equal(with_domains, model(*_inputs()).latent_BCxyz)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_frozen_router_chooses_like_a_learning_one_but_gets_no_gradient(kind):
    frozen, learning = (
        _model(MoEConfig(**LAYER, expert_hidden=16, router=RouterConfig(kind=kind, frozen=value)))
        for value in (True, False)
    )
    a, b = frozen(*_inputs()), learning(*_inputs())
    assert torch.equal(a.latent_BCxyz, b.latent_BCxyz)
    a.latent_BCxyz.square().mean().backward()
    b.latent_BCxyz.square().mean().backward()
    for name, parameter in frozen.named_parameters():
        if ".router." in name:
            assert marks(parameter).lr_scale == 0
            assert parameter.grad.abs().max() == 0
    for frozen_layer, learning_layer in zip(frozen.moe_layers, learning.moe_layers, strict=True):
        assert learning_layer.router.projection.weight.grad.abs().max() > 0
        # The experts still learn.
        torch.testing.assert_close(frozen_layer.experts.down_LFD.grad, learning_layer.experts.down_LFD.grad)
