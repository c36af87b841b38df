"""Rollouts keep the paths that the given latents chose."""

from __future__ import annotations

from itertools import islice

import torch

from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.inference.rollout import rollout
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel

CHANNELS, GRID = 4, [2, 2, 2]


def _model(context: str) -> LatentTransformer:
    """A model whose first prediction leads most samples to another path."""
    moe = MoEConfig(num_experts=2, expert_hidden=8, scope="path", router=RouterConfig(kind="linear", context=context))
    config = ModelConfig(dim=8, depth=1, heads=1, history=1, moe=moe)
    model = LatentTransformer(config, CHANNELS, seed=0, ep=ExpertParallel()).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.head.parameters(), *model.routers[0].parameters()):
        torch.nn.init.normal_(parameter, std=3.0, generator=generator)
    return model


def _given() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, CHANNELS, *GRID, generator=generator), torch.zeros(8, CHANNELS, *GRID)


def _experts(model: LatentTransformer, history: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
    return model(history, geometry).routing[0].expert_N.view(len(history), -1)[:, 0]


@torch.no_grad()
def test_the_path_of_a_sample_stays_that_of_its_given_latents() -> None:
    model = _model("sample")
    history, geometry = _given()
    first, second = islice(rollout(model, history, geometry), 2)
    assert torch.equal(first, model(history, geometry).latent_BCxyz)
    left_B = _experts(model, first[:, None], geometry) != _experts(model, history, geometry)
    assert left_B.any()  # from the predicted latents alone the router would choose otherwise
    kept = model(first[:, None], geometry, plan=model.lasting_plan(history, geometry)).latent_BCxyz
    assert torch.equal(second, kept)
    assert not torch.isclose(second, model(first[:, None], geometry).latent_BCxyz)[left_B].all()


@torch.no_grad()
def test_paths_of_tokens_are_chosen_anew() -> None:
    model = _model("token")
    history, geometry = _given()
    first, second = islice(rollout(model, history, geometry), 2)
    assert torch.equal(second, model(first[:, None], geometry).latent_BCxyz)
