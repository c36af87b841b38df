"""The router interface: its inputs, and adding a router with one file and one line."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.config.load import load_config
from shodh_moe.config.routers import ROUTERS
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.parallel import ExpertParallel
from tests.tiny import LAYER, write_config


def test_a_context_knows_the_sample_of_each_token():
    context = Context(3, torch.tensor([7, 5, 6]))
    x_ND = torch.zeros(6, 4)
    assert context.sample_M(x_ND).tolist() == [0, 0, 1, 1, 2, 2]
    assert context.by_row(context.domain_B, 6).tolist() == [7, 7, 5, 5, 6, 6]
    assert Context().sample_M(x_ND).tolist() == [0] * 6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_new_router_is_one_file_and_one_line(monkeypatch, frozen, recompute):
    with pytest.raises(ValidationError, match="'cosine', 'linear' or 'oracle'"):
        RouterConfig(kind="round_robin")
    monkeypatch.setitem(ROUTERS, "round_robin", "tests.model.round_robin:RoundRobinRouter")
    moe = MoEConfig(**LAYER, num_experts=2, expert_hidden=16, router=RouterConfig(kind="round_robin", frozen=frozen))
    model = LatentTransformer(
        ModelConfig(dim=24, depth=2, heads=2, moe=moe),
        latent_channels=5,
        seed=0,
        ep=ExpertParallel(),
        activation_checkpointing=recompute,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    history, geometry = torch.randn(3, 2, 5, 4, 4, 2), torch.randn(3, 5, 4, 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        prediction = model(history, geometry)
        for routing in prediction.routing:
            assert torch.equal(routing.expert_N.view(3, 32), torch.tensor([0, 1, 0])[:, None].expand(3, 32))
        loss = prediction.latent_BCxyz.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    confidence = model.state_dict()["blocks.1.moe.router.confidence"]
    assert (confidence == 1) == frozen


def test_an_unknown_router_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"router\.kind should be 'cosine', 'linear' or 'oracle', not 'cosin'"):
        load_config(write_config(tmp_path), ["model.moe.router.kind=cosin"])
    with pytest.raises(UserError, match=r"should be 'cosine', 'linear' or 'oracle', not \[1\]"):
        load_config(write_config(tmp_path), ["model.moe.router.kind=[1]"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frozen_router_stays_frozen_in_any_precision(dtype):
    moe = MoEConfig(**LAYER, expert_hidden=16, router=RouterConfig(frozen=True))
    config = ModelConfig(dim=24, depth=1, heads=2, moe=moe)
    model = LatentTransformer(config, 5, 0, ExpertParallel()).to(dtype)
    torch.nn.init.normal_(model.head.weight)
    prediction = model(torch.randn(3, 2, 5, 4, 4, 2, dtype=dtype), torch.randn(3, 5, 4, 4, 2, dtype=dtype))
    prediction.latent_BCxyz.square().mean().backward()
    for parameter in model.blocks[0].moe.router.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.abs().max() == 0
    assert model.blocks[0].moe.experts.down_LFD.grad.abs().max() > 0
