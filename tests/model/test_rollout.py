"""Chains of predictions: what their gradients pass through; strides and scales that the transformer is told."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig, MoEConfig
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.inputs import history_scale
from shodh_moe.model.rollout import predictions
from shodh_moe.parallel import ExpertParallel

CHANNELS, GRID = 4, [2, 2, 2]


def _model(**settings: object) -> LatentTransformer:
    moe = MoEConfig(num_experts=2, expert_hidden=8)
    config = ModelConfig.model_validate({"dim": 8, "depth": 1, "heads": 1, "moe": moe, **settings})
    model = LatentTransformer(config, CHANNELS, GRID, seed=0, ep=ExpertParallel()).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def _given(samples: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((samples, 2, CHANNELS, *GRID), (samples, CHANNELS, *GRID))
    history, geometry = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return history, geometry


def _gradients(model: LatentTransformer, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, [*model.embed.parameters(), *model.head.parameters()], allow_unused=True))


def test_the_gradient_of_a_pushed_prediction_is_that_of_its_input_as_data() -> None:
    model = _model()
    history, geometry = _given()
    plan = model.lasting_plan(history, geometry)
    first, second = islice(predictions(model, history, geometry), 2)
    given = torch.cat([history[:, 1:], first.latent_BCxyz.detach()[:, None]], dim=1)
    alone = model(given, geometry, plan=plan).latent_BCxyz
    assert torch.equal(second.latent_BCxyz, alone)
    found, wanted = (_gradients(model, latent.square().sum()) for latent in (second.latent_BCxyz, alone))
    assert all(map(torch.equal, found, wanted))


def test_gradients_through_time_are_those_of_finite_differences() -> None:
    model = _model()
    history, geometry = _given()
    weight = model.head.weight
    assert weight is not None

    def value(through: bool) -> Tensor:
        *_, last = islice(predictions(model, history, geometry, through=through), 3)
        return last.latent_BCxyz.square().sum()

    (slope,) = torch.autograd.grad(value(through=True), [weight])
    (pushed,) = torch.autograd.grad(value(through=False), [weight])
    with torch.no_grad():
        step = 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        weight += step
        above = value(through=True)
        weight -= 2 * step
        below = value(through=True)
        weight += step
    assert float((slope * step).sum()) == pytest.approx(float(above - below) / 2, rel=1e-5)
    assert float((pushed * step).sum()) != pytest.approx(float(above - below) / 2, rel=1e-2)


@torch.no_grad()
def test_a_scaled_history_scales_the_change_and_nothing_else() -> None:
    scaled, plain = _model(scale_history=True), _model()
    history, geometry = _given()
    for factor in (8.0, 0.125):
        one, other = (scaled(part, geometry) for part in (history, factor * history))
        torch.testing.assert_close(other.latent_BCxyz, factor * one.latent_BCxyz)
        assert torch.equal(one.routing[0].expert_N, other.routing[0].expert_N)
    assert not torch.isclose(plain(8 * history, geometry).latent_BCxyz, 8 * plain(history, geometry).latent_BCxyz).all()
    unit = history / history_scale(history)[:, None]
    torch.testing.assert_close(scaled(unit, geometry).latent_BCxyz, plain(unit, geometry).latent_BCxyz)


@torch.no_grad()
def test_a_history_without_flow_is_not_divided_by_zero() -> None:
    history, geometry = _given()
    assert _model(scale_history=True)(0 * history, geometry).latent_BCxyz.isfinite().all()


@torch.no_grad()
def test_the_network_is_told_each_samples_stride() -> None:
    model, plain = _model(strides=[1, 2, 5]), _model()
    history, geometry = _given()
    assert plain.stride is None
    assert model.state_dict().keys() - plain.state_dict().keys() == {"stride.weight_SD"}
    assert torch.equal(model(history, geometry).latent_BCxyz, plain(history, geometry).latent_BCxyz)  # before training
    assert model.stride is not None
    torch.nn.init.normal_(model.stride.weight_SD, generator=torch.Generator().manual_seed(3))
    mixed = model(history, geometry, Context(3, stride_B=torch.tensor([5, 1, 2]))).latent_BCxyz
    for row, stride in enumerate((5, 1, 2)):
        all_alike = model(history, geometry, Context(3, stride_B=torch.full((3,), stride))).latent_BCxyz
        torch.testing.assert_close(mixed[row], all_alike[row])
    assert not torch.isclose(mixed[0], plain(history, geometry).latent_BCxyz[0]).all()
    unsaid, first = (model(history, geometry, context) for context in (None, Context(3, stride_B=torch.ones(3).long())))
    assert torch.equal(unsaid.latent_BCxyz, first.latent_BCxyz)


@torch.no_grad()
def test_a_stride_that_the_model_does_not_know_is_refused() -> None:
    history, geometry = _given()
    with pytest.raises(UserError, match="stride 3: the model was trained with the time stride 1, 2: choose one of"):
        _model(strides=[1, 2])(history, geometry, Context(3, stride_B=torch.tensor([1, 3, 2])))
