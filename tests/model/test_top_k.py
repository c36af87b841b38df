"""Several experts per token: layers and paths against a plain loop over tokens and their experts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shodh_moe.audit.arm_models import ARMS
from shodh_moe.config import Config, ModelConfig, MoEConfig
from shodh_moe.model import LatentTransformer, MoE
from shodh_moe.model.plan import make_plan, moe_capacity
from shodh_moe.model.routed_linear import RoutedLinear
from shodh_moe.model.routers import ONE_SAMPLE, make_router
from shodh_moe.parallel import ExpertParallel
from tests.tiny import LAYER

TOKENS, DIM = 40, 6


def _config(**moe) -> MoEConfig:
    return MoEConfig.model_validate(
        LAYER
        | {"num_experts": 5, "top_k": 3, "expert_hidden": 4, "min_capacity": 1, "router": {"kind": "linear"}}
        | moe
    )


def _by_loop(layer: MoE, x_ND: torch.Tensor) -> torch.Tensor:
    """Send each token in turn to its most probable experts that still have a slot."""
    config = layer.config
    left = [TOKENS if config.dropless else moe_capacity(config, TOKENS)] * config.num_experts
    p_NE = layer.router.projection(x_ND).softmax(1)
    outputs = []
    for x_D, p_E in zip(x_ND, p_NE, strict=True):
        y_D = sum(shared(x_D) for shared in layer.shared)
        for expert in p_E.argsort(descending=True)[: config.top_k].tolist():
            if left[expert]:
                left[expert] -= 1
                gate, up = (x_D @ layer.experts.gate_up_LDF[expert]).chunk(2)
                y_D = y_D + p_E[expert] * ((F.silu(gate) * up) @ layer.experts.down_LFD[expert])
        outputs.append(y_D)
    return torch.stack(outputs)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("dropless", [False, True])
def test_a_layer_equals_a_loop_over_tokens_and_experts(top_k, dropless):
    torch.manual_seed(0)
    config = _config(top_k=top_k, dropless=dropless, capacity_factor=0.8)
    layer = MoE(DIM, config, ExpertParallel(), 0, 0).double()
    x_ND = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    y_ND, routing = layer(x_ND)
    expected_ND = _by_loop(layer, x_ND)
    torch.testing.assert_close(y_ND, expected_ND)
    assert routing.kept_N.all() == dropless
    inputs = [x_ND, *layer.parameters()]
    weight_ND = torch.randn_like(y_ND)
    actual, wanted = (torch.autograd.grad(y, inputs, weight_ND) for y in (y_ND, expected_ND))
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dropless", [False, True])
def test_a_routed_linear_map_adds_the_maps_of_all_the_tokens_experts(rank, dropless):
    torch.manual_seed(0)
    config = _config(scope="path", dropless=dropless, capacity_factor=0.8)
    router = make_router(config.router, DIM, 5).double()
    x_ND = torch.randn(TOKENS, DIM, dtype=torch.float64)
    plan = make_plan(router, x_ND, ONE_SAMPLE, config, ExpertParallel(), training=True)
    layer = RoutedLinear(DIM, 7, experts=5, rank=rank).double()
    if rank:
        torch.nn.init.normal_(layer.widen_EQO)
    matrices = layer.routed_EIO if rank is None else layer.narrow_EIQ @ layer.widen_EQO
    gate_NJ = plan.gating.gate_N * (plan.gating.slot_N >= 0)
    routed_ND = torch.einsum("ni,njio,nj->no", x_ND, matrices[plan.gating.expert_N], gate_NJ)
    torch.testing.assert_close(layer(x_ND, plan), F.linear(x_ND, layer.weight, layer.bias) + routed_ND)
    assert (plan.gating.slot_N >= 0).all() == dropless


@pytest.mark.parametrize("scope", ["layer", "path"])
def test_every_parameter_of_a_network_learns(scope):
    config = ModelConfig(dim=24, depth=2, heads=2, moe=_config(scope=scope, dropless=True, router={}))
    model = LatentTransformer(config, 5, 0, ExpertParallel())
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    out = model(torch.randn(6, 2, 5, 4, 4, 2), torch.randn(6, 5, 4, 4, 2))
    (out.latent_BCxyz.square().mean() + out.routing[0].balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(layer.chosen_N.shape == (6 * 32, 3) and layer.expert_N.shape == (6 * 32,) for layer in out.routing)


def test_the_arms_of_an_audit_stay_valid():
    """Arms with one expert or a control router have neither several choices nor a bias."""
    moe = {"scope": "path", "num_experts": 3, "top_k": 2, "router": {"balance": "bias"}}
    base = Config.model_validate({"model": {"dim": 24, "depth": 1, "heads": 2, "moe": moe}})
    for arm in ARMS.values():
        ModelConfig.model_validate(arm.model(base, 3).model_dump())
