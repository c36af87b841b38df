"""Path routing: what decides, what follows the decision, and where the router starts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.path import Features, PathRouter
from shodh_moe.model.plan import make_plan
from shodh_moe.model.routed_linear import RoutedLinear
from shodh_moe.model.routers import ONE_SAMPLE, make_router
from shodh_moe.model.routers.kmeans import kmeans
from shodh_moe.parallel import ExpertParallel

CHANNELS, GRID, HISTORY = 5, (4, 4, 2), 2
INPUTS = (HISTORY + 1) * CHANNELS


def _config(attention: str = "shared", context: str = "sample", **moe: Any) -> ModelConfig:
    router = RouterConfig(context=context, start="random")
    moe = {"num_experts": 3, "expert_hidden": 16, "shared_experts": 1} | moe
    return ModelConfig(
        dim=24,
        depth=2,
        heads=2,
        moe=MoEConfig(scope="path", attention=attention, attention_rank=2, router=router, **moe),
    )


def _model(config: ModelConfig, **options: Any) -> LatentTransformer:
    """A model in which every part changes the prediction."""
    model = LatentTransformer(config, CHANNELS, seed=0, ep=ExpertParallel(), **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():  # the head, and low-rank additions
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if (
        model.path and config.moe.router.kind == "cosine"
    ):  # random samples differ too little for a random start to separate them
        model.path.router.start(model.path.features(model.embedding_inputs(*_inputs(12)), GRID)[0].detach(), seed=0)
    return model


def _inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, HISTORY, CHANNELS, *GRID, generator=g), torch.randn(batch, CHANNELS, *GRID, generator=g)


@pytest.mark.parametrize("context", ["sample", "window", "token", "both"])
@pytest.mark.parametrize("attention", ["shared", "low_rank", "own"])
def test_every_layer_follows_one_decision_and_every_parameter_learns(context, attention):
    model = _model(_config(attention, context))
    out = model(*_inputs(12))
    first, second = out.routing
    assert torch.equal(first.expert_N, second.expert_N)
    assert set(first.expert_N.tolist()) == {0, 1, 2}
    (out.latent_BCxyz.square().mean() + first.balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    sets = {marks(p).group for p in model.parameters()}
    assert sets == {"router", "path", "attention", "shared", "expert", "rest"}


def test_a_sample_has_one_path_and_a_window_too():
    sample, window = (PathRouter(INPUTS, _config(context=c).moe, ExpertParallel()) for c in ("sample", "window"))
    z_BSI = torch.randn(3, 32, INPUTS, generator=torch.Generator().manual_seed(0))
    window.router.start(window.features(z_BSI, GRID)[0], seed=0)  # few random prototypes separate random windows
    assert sample(z_BSI, GRID, Context(3)).gating.expert_N.view(3, 32).unique(dim=1).shape[1] == 1
    experts = window(z_BSI, GRID, Context(3)).gating.expert_N.view(3, *GRID)
    for sample_xyz, x, y in itertools.product(experts, (0, 2), (0, 2)):
        assert len(sample_xyz[x : x + 2, y : y + 2].unique()) == 1
    assert len(experts.unique()) > 1


def test_the_context_is_mean_and_deviation_scaled_to_rms_one():
    z_BSI = 7 * torch.randn(3, 32, INPUTS)
    features = Features(INPUTS, _config().moe)
    x_MF, row_N = features(z_BSI, GRID)
    assert row_N.tolist() == [0] * 32 + [1] * 32 + [2] * 32
    expected = torch.cat([z_BSI.mean(1), z_BSI.std(1, correction=0)], dim=1)
    torch.testing.assert_close(x_MF[:, :-1], F.normalize(expected, dim=1) * (2 * INPUTS) ** 0.5)
    assert (x_MF[:, -1] == 1).all()
    # The order of tokens does not matter.
    torch.testing.assert_close(features(z_BSI[:, torch.randperm(32)], GRID)[0], x_MF)


def test_the_window_context_is_that_of_its_own_tokens():
    z_BSI = torch.randn(2, 32, INPUTS)
    x_MF, row_N = Features(INPUTS, _config(context="window").moe)(z_BSI, GRID)
    inside = z_BSI.view(2, *GRID, INPUTS)[1, 2:4, :2].reshape(8, INPUTS)  # x = 2..3, y = 0..1, z = 0..1
    row = int(row_N.view(2, *GRID)[1, 3, 1, 0])
    expected = torch.cat([inside.mean(0), inside.std(0, correction=0)])
    torch.testing.assert_close(x_MF[row, :-1], F.normalize(expected, dim=0) * (2 * INPUTS) ** 0.5)


def test_a_window_that_does_not_divide_the_grid_is_refused():
    config = _config(context="window")
    moe = config.moe.model_copy(update={"router": config.moe.router.model_copy(update={"window": 3})})
    with pytest.raises(UserError, match=r"router\.window 3 does not divide the grid of tokens \[4, 4, 2\]"):
        _model(config.model_copy(update={"moe": moe}))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dropless", [True, False])
def test_a_routed_linear_map_adds_the_map_of_the_tokens_expert(rank, dropless):
    moe = _config(dropless=dropless, capacity_factor=0.7, min_capacity=1).moe
    router = make_router(moe.router, 8, 3).double()
    x_ND = torch.randn(40, 8, dtype=torch.float64)
    plan = make_plan(router, x_ND, ONE_SAMPLE, moe, ExpertParallel(), training=True)
    layer = RoutedLinear(8, 6, experts=3, rank=rank).double()
    if rank:
        torch.nn.init.normal_(layer.widen_EQO)
    matrices = layer.routed_EIO if rank is None else layer.narrow_EIQ @ layer.widen_EQO
    gating = plan.gating
    routed = torch.einsum("ni,nio->no", x_ND, matrices[gating.expert_N]) * gating.gate_N[:, None]
    expected = F.linear(x_ND, layer.weight, layer.bias) + routed * (gating.slot_N >= 0)[:, None]
    torch.testing.assert_close(layer(x_ND, plan), expected)
    torch.testing.assert_close(layer(x_ND.view(4, 10, 8), plan), expected.view(4, 10, 6))
    assert (gating.slot_N >= 0).all() == dropless
    parameters = [p for p in layer.parameters() if p.numel()]
    actual = torch.autograd.grad(layer(x_ND, plan).square().sum(), parameters, retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_without_shared_linear_only_norms_and_biases_are_shared():
    model = _model(_config(shared_experts=0, shared_linear=False, attention="own"))
    shared = [name for name, p in model.named_parameters() if not marks(p).per_expert and marks(p).group != "router"]
    assert {name.rpartition(".")[2] for name in shared} <= {"bias", "weight"}
    assert all(p.dim() == 1 for name, p in model.named_parameters() if name in shared)
    history, geometry = _inputs(12)
    out = model(history, geometry)
    out.latent_BCxyz.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    plan = model.path(model.embedding_inputs(history, geometry), GRID, Context(12))
    z_NI = model.embedding_inputs(history, geometry).flatten(0, 1)
    expected = torch.einsum("ni,nio->no", z_NI, model.embed.routed_EIO[plan.gating.expert_N])
    expected = expected * plan.gating.gate_N[:, None] + model.embed.bias
    torch.testing.assert_close(model.embed(z_NI, plan), expected)


def test_an_experts_initial_weights_do_not_depend_on_the_number_of_experts():
    few, many = (_model(_config("own", num_experts=experts)).state_dict() for experts in (2, 5))
    own = [name for name in few if "routed_EIO" in name or "experts." in name]
    assert len(own) == 2 + 2 * 4
    for name in own:
        torch.testing.assert_close(many[name][:2], few[name], rtol=0, atol=0)
        assert name == "head.routed_EIO" or not torch.equal(few[name][0], few[name][1])


def test_the_commitment_loss_makes_decisions_clearer():
    model = _model(_config())
    router = list(model.path.router.parameters())
    before = model(*_inputs()).routing[0]
    torch.testing.assert_close(before.commitment_loss, -before.gate_N.log().mean())
    for parameter, gradient in zip(router, torch.autograd.grad(before.commitment_loss, router), strict=True):
        parameter.data -= 0.01 * gradient
    after = model(*_inputs()).routing[0]
    assert torch.equal(after.expert_N, before.expert_N)
    assert after.gate_N.mean() > before.gate_N.mean()


def test_dropped_tokens_keep_the_shared_parts_only():
    config = _config(capacity_factor=0.5, min_capacity=1, dropless=False)
    model = _model(config)
    assert not all(layer.kept_N.all() for layer in model(*_inputs(12)).routing)
    model.eval()
    history, geometry = _inputs(12)
    assert all(layer.kept_N.all() for layer in model(history, geometry).routing)
    assert not all(layer.kept_N.all() for layer in model(history, geometry, Context(12, drop=True)).routing)


def test_the_oracle_sends_whole_samples_along_the_path_of_their_domain():
    config = _config()
    moe = config.moe.model_copy(update={"router": RouterConfig(kind="oracle")})
    model = _model(config.model_copy(update={"moe": moe}))
    routing = model(*_inputs(4), Context(4, torch.tensor([2, 0, 1, 2]))).routing
    assert routing[0].expert_N.view(4, 32).unique(dim=1).flatten().tolist() == [2, 0, 1, 2]
    assert (routing[0].gate_N == 1).all()


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("attention", ["shared", "low_rank"])
def test_recomputed_blocks_give_the_same_gradients(dropless, attention):
    models = [
        _model(_config(attention, dropless=dropless, capacity_factor=0.8), activation_checkpointing=on)
        for on in (False, True)
    ]
    for model in models:
        out = model(*_inputs())
        (out.latent_BCxyz.square().mean() + 0.1 * out.routing[0].balance_loss).backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_bfloat16_autocast_decides_like_float32():
    model = _model(_config("own"))
    wide = model(*_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(*_inputs())
    history, _ = _inputs()
    assert torch.equal(wide.routing[0].expert_N, narrow.routing[0].expert_N)
    assert torch.equal(wide.routing[0].gate_N, narrow.routing[0].gate_N)
    change, expected = (out.latent_BCxyz - history[:, -1] for out in (narrow, wide))
    assert not torch.equal(change, expected)
    assert (change - expected).norm() < 0.03 * expected.norm()


def test_k_means_finds_separate_groups_and_does_not_invent_any():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [5, 5, 5]])
    rows = centres.repeat(20, 1) + 0.1 * torch.randn(80, 3, generator=generator)
    found = kmeans(rows, 4, seed=0)
    assert torch.cdist(found, centres.double()).amin(0).max() < 0.1
    assert torch.equal(found, kmeans(rows, 4, seed=0))
    assert len(kmeans(centres.repeat(5, 1), 8, seed=0)) == 4


def test_the_start_separates_groups_whose_common_part_is_large():
    """The projection subtracts the mean, so that groups in one direction from the origin get different experts."""
    generator = torch.Generator().manual_seed(0)
    group_M = torch.arange(90) % 3
    offset_GF = 0.3 * torch.randn(3, 12, generator=generator)
    rows = 10 + offset_GF[group_M] + 0.02 * torch.randn(90, 12, generator=generator)
    rows[:, -1] = 1
    moe = _config().moe
    router = make_router(moe.router, 12, 3)
    router.start(rows, seed=0)
    expert_M = make_plan(router, rows, ONE_SAMPLE, moe, ExpertParallel(), training=False).gating.expert_N
    assert len({(int(g), int(e)) for g, e in zip(group_M, expert_M, strict=True)}) == 3
    assert len(expert_M.unique()) == 3


def test_more_experts_than_rows_keep_random_prototypes():
    router = make_router(_config().moe.router, 12, 6)
    before = router.prototypes_ER.clone()
    router.start(torch.cat([torch.randn(4, 11), torch.ones(4, 1)], dim=1), seed=0)
    assert torch.equal(router.prototypes_ER[4:], before[4:])
    assert not torch.equal(router.prototypes_ER[:4], before[:4])
    assert router.projection.weight.isfinite().all()


@pytest.mark.parametrize("context", ["sample", "window", "token", "both"])
def test_film_modulates_embedding_and_head_by_the_same_features(context):
    dense = _config(context=context, num_experts=0).model_copy(update={"film": True})
    plain, told = _model(dense.model_copy(update={"film": False})), _model(dense)
    told.load_state_dict(plain.state_dict(), strict=False)
    for parameter in told.film.out.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(told(*_inputs()).latent_BCxyz, plain(*_inputs()).latent_BCxyz)
    told.film.out.weight.data.normal_()
    changed = told(*_inputs()).latent_BCxyz
    assert not torch.allclose(changed, plain(*_inputs()).latent_BCxyz)
    changed.square().mean().backward()
    assert told.film.hidden.weight.grad.any()
    z_BSI = told.embedding_inputs(*_inputs())
    first, last = told.film(z_BSI, GRID)
    assert first.shape == last.shape == (4, 32, 2 * 24)
    assert (first.unique(dim=1).shape[1] == 1) == (context == "sample")
