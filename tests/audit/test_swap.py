from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shodh_moe.audit.routing import heldout_routing
from shodh_moe.audit.swap import exchanged, swap_growth
from shodh_moe.audit.windows import latent_errors
from shodh_moe.config import Config
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory, load_latents
from tests import tiny
from tests.audit.tiny import make_transformer
from tests.tiny import LAYER
from tests.training.synthetic import write_latents

ORACLE: dict[str, Any] = {"expert_hidden": 8, "router": {"kind": "oracle"}}


def _config(depth: int = 2, **moe: Any) -> Config:
    model = {"dim": 16, "depth": depth, "heads": 2, "patch": 1, "norms": "pre", "moe": {**LAYER, **ORACLE, **moe}}
    return tiny.config(model=model, evaluation={"batch_size": 3})


def _growth(config: Config, transformer: LatentTransformer, test: list[LatentTrajectory], **settings: Any) -> Any:
    routing = heldout_routing(transformer, test, None, config)
    return swap_growth(transformer, LatentSamples(test, 2), routing, 3, **settings)


@pytest.fixture(scope="module")
def test_split(tmp_path_factory: pytest.TempPathFactory) -> list[LatentTrajectory]:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return load_latents(folder, "test")


def test_exchanging_equal_experts_does_not_increase_the_error(test_split: list[LatentTrajectory]) -> None:
    config = _config()
    transformer = make_transformer(config)
    for layer in transformer.moe_layers:
        for weights in (layer.experts.gate_up_LDF.data, layer.experts.down_LFD.data):
            weights[1] = weights[0]
    one = {"layers": [1.0, 1.0], "all": 1.0}
    assert _growth(config, transformer, test_split) == {"open_channel": one, "porous_media": one}


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("scope", [{}, {"scope": "path", "attention": "own"}], ids=["layer", "path"])
def test_the_increase_equals_that_of_naming_the_other_domain(
    test_split: list[LatentTrajectory], count: int | None, scope: dict[str, str]
) -> None:
    """Under the oracle router, exchanging all experts, or whole paths, equals naming the other domain."""
    config = _config(**scope)
    transformer = make_transformer(config)
    with torch.no_grad():
        if transformer.path:
            transformer.head.routed_EIO.normal_(std=0.1)
        for layer in transformer.moe_layers:
            layer.experts.down_LFD *= 5
    found = _growth(config, transformer, test_split, count=count)
    samples = LatentSamples(test_split, 2)
    for number, domain in enumerate(samples.domains):
        batch = samples.batch([(number, n) for n in ((0, 2) if count else range(5))])
        history, geometry, target = batch.history_BHCxyz, batch.geometry_BCxyz, batch.target_BCxyz
        errors = []
        for expert in (number, 1 - number):
            with torch.no_grad():
                out = transformer(history, geometry, Context(len(history), torch.full((len(history),), expert)))
            errors.append(float((out.latent_BCxyz - target).square().mean()))
        assert found[domain]["all"] == pytest.approx(errors[1] / errors[0], rel=1e-5)
        assert errors[0] != pytest.approx(errors[1], rel=1e-3)
        assert len(set(found[domain]["layers"])) == 2


def test_weights_are_restored_bit_for_bit(test_split: list[LatentTrajectory]) -> None:
    config = _config(num_experts=3)
    transformer = make_transformer(config)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    first, second = (layer.experts for layer in transformer.moe_layers)
    with exchanged(transformer, [(0, 2), None]):
        assert torch.equal(first.down_LFD[[2, 1, 0]], before["blocks.0.moe.experts.down_LFD"])
        assert torch.equal(first.gate_up_LDF[[2, 1, 0]], before["blocks.0.moe.experts.gate_up_LDF"])
        assert torch.equal(second.down_LFD, before["blocks.1.moe.experts.down_LFD"])
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    with pytest.raises(ValueError, match="training mode"), exchanged(transformer.train(), [(0, 1), (1, 2)]):
        latent_errors(transformer, LatentSamples(test_split, 2), 3)
    transformer.eval()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    _growth(config, transformer, test_split)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_domains_that_share_their_majority_expert_have_no_other_expert(test_split: list[LatentTrajectory]) -> None:
    config = _config(num_experts=1)
    nothing = {"layers": [None, None], "all": None}
    found = _growth(config, make_transformer(config), test_split)
    assert found == {"open_channel": nothing, "porous_media": nothing}


def test_a_dense_model_has_no_experts_to_exchange(test_split: list[LatentTrajectory]) -> None:
    config = _config(num_experts=0, router={})
    assert _growth(config, make_transformer(config), test_split) is None


def test_the_other_domain_is_the_first_with_another_expert(test_split: list[LatentTrajectory]) -> None:
    """The oracle gives a and b equal experts, so they have none to exchange; c gets another expert from a."""
    config = _config(depth=1, num_experts=3)
    transformer = make_transformer(config)
    experts = transformer.moe_layers[0].experts
    for weights in (experts.gate_up_LDF.data, experts.down_LFD.data):
        weights[1] = weights[0]
    test = [replace(one, domain=name) for name, one in zip("abc", test_split * 2, strict=False)]
    found = _growth(config, transformer, test)
    assert found["a"] == found["b"] == {"layers": [1.0], "all": 1.0}
    assert found["c"]["layers"] == [found["c"]["all"]] != [1.0]
