from __future__ import annotations

import math
from itertools import combinations, count
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shodh_moe.audit.gradients import gradient_conflict, gradients_over_training
from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint import CheckpointWriter, model_fragments
from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory
from tests import tiny
from tests.tiny import LAYER

SHAPE = (3, 2, 2, 2)
FILES = count()  # numbers for the names of in-memory files
MOE = ["attention", "expert 0", "expert 1", "rest", "router", "shared"]


def _config(**moe: Any) -> Config:
    model = {
        "dim": 8,
        "depth": 2,
        "heads": 1,
        "patch": 1,
        "history": 2,
        "norms": "pre",
        "moe": LAYER | {"expert_hidden": 8, **moe},
    }
    return tiny.config(model=model, evaluation={"batch_size": 3})


def _transformer(config: Config, head: float = 0.1) -> LatentTransformer:
    transformer = LatentTransformer(config.model, SHAPE[0], 0, ExpertParallel())
    torch.nn.init.normal_(transformer.head.weight, std=head)
    return transformer


def _samples(**windows: list[Tensor]) -> LatentSamples:
    """Make one trajectory, so one sample, for each window [H + 1, C, x, y, z] of a domain, all with one geometry."""
    geometry = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    file = h5py.File(f"memory {next(FILES)}", "w", driver="core", backing_store=False)
    trajectories = [
        LatentTrajectory(
            domain, "s", number, file.create_dataset(f"{domain}/{number}", data=z.numpy()), geometry, geometry[0]
        )
        for domain, found in windows.items()
        for number, z in enumerate(found)
    ]
    return LatentSamples(trajectories, 2)


def _history(seed: int = 0) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def _window(history: Tensor, target: Tensor) -> Tensor:
    return torch.cat([history, target[None]])


def _random(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 3, *SHAPE, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("experts", [0, 2])
def test_opposite_errors_give_opposite_gradients_in_every_group(experts: int) -> None:
    """The inputs are equal and the targets lie on opposite sides of the prediction, one three times as far.

    A gradient of the router's losses, which both domains share, would move the router's cosine away from -1.
    """
    config = _config(num_experts=experts)
    transformer, history = _transformer(config), _history()
    probe = _samples(a=[_window(history, history[-1])])
    with torch.no_grad():
        inputs = probe.batch([(0, 0)])
        predicted = transformer.eval()(*inputs[:2]).latent_BCxyz[0]
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    samples = _samples(a=[_window(history, predicted + 3 * delta)] * 2, b=[_window(history, predicted - delta)] * 2)
    found = gradient_conflict(transformer, samples, 2, 2)
    assert sorted(found) == (MOE if experts else ["attention", "rest", "shared"])
    checked = 0
    for name, group in found.items():
        if name.startswith("expert") and group["cosine"]["a|b"] is None:
            continue  # the expert gets no token
        checked += 1
        assert group["cosine"]["a|b"] == pytest.approx(-1, abs=1e-5)
        assert group["ratio"]["a|b"] == pytest.approx(3, rel=1e-4)
        assert group["within"] == {"a": pytest.approx(1), "b": pytest.approx(1)}
    assert checked >= (5 if experts else 3)


def test_orthogonal_errors_by_hand() -> None:
    """With a zero head, the head's gradient is the error times the features, and all other gradients vanish."""
    transformer, history = _transformer(_config(), head=0), _history()
    first, second = torch.zeros(2, *SHAPE)
    first[0], second[1] = 1, 1
    one, other = (_window(history, history[-1] + error) for error in (first, second))
    found = gradient_conflict(transformer, _samples(a=[one, one, other, other], b=[one] * 4), 4, 1)
    assert found["rest"] == {
        "cosine": {"a|b": pytest.approx(1 / math.sqrt(2))},
        "ratio": {"a|b": pytest.approx(1 / math.sqrt(2))},
        "within": {"a": pytest.approx(0, abs=1e-7), "b": pytest.approx(1)},
    }
    nothing = {"cosine": {"a|b": None}, "ratio": {"a|b": None}, "within": {"a": None, "b": None}}
    for name in set(MOE) - {"rest"}:
        assert found[name] == nothing


def test_equal_domains_agree_and_batches_do_not_matter() -> None:
    transformer, windows = _transformer(_config()), _random(5, 3)
    samples = _samples(a=windows, b=windows)
    found = gradient_conflict(transformer, samples, 5, 5)
    for name, group in gradient_conflict(transformer, samples, 5, 2).items():
        assert group["cosine"]["a|b"] == pytest.approx(1)
        assert group["ratio"]["a|b"] == pytest.approx(1)
        assert group["within"]["a"] == group["within"]["b"] == pytest.approx(found[name]["within"]["a"], abs=1e-4)


def test_only_evenly_spread_samples_are_used() -> None:
    transformer, windows = _transformer(_config()), _random(6, 4)
    others = [window if n in (0, 3) else -window for n, window in enumerate(windows)]
    b = _random(2, 5)
    assert gradient_conflict(transformer, _samples(a=windows, b=b), 2, 2) == gradient_conflict(
        transformer, _samples(a=others, b=b), 2, 2
    )


def test_an_expert_without_tokens() -> None:
    """The oracle sends domain a to expert 0 and domain b to expert 1; it has no weights of its own."""
    transformer = _transformer(_config(router={"kind": "oracle"}))
    found = gradient_conflict(transformer, _samples(a=_random(2, 1), b=_random(2, 2)), 2, 2)
    assert sorted(found) == [name for name in MOE if name != "router"]
    for expert, ratio, own, other in ((0, None, "a", "b"), (1, 0.0, "b", "a")):
        group = found[f"expert {expert}"]
        assert group["cosine"] == {"a|b": None}
        assert group["ratio"] == {"a|b": ratio}
        assert group["within"][own] is not None
        assert group["within"][other] is None
    assert found["shared"]["cosine"]["a|b"] is not None


def test_a_frozen_router_has_no_gradient() -> None:
    transformer = _transformer(_config(router={"frozen": True}))
    found = gradient_conflict(transformer, _samples(a=_random(2, 1), b=_random(2, 2)), 2, 2)
    assert found["router"]["cosine"] == {"a|b": None}


def test_mode_and_gradients_are_restored_and_no_token_is_dropped() -> None:
    transformer = _transformer(_config(capacity_factor=0.1, min_capacity=1)).train()
    samples = _samples(a=_random(2, 1), b=_random(2, 2))
    transformer.head.bias.grad = kept = torch.ones(SHAPE[0])
    with torch.no_grad():
        found = gradient_conflict(transformer, samples, 2, 4)
    assert all(module.training for module in transformer.modules())
    assert transformer.head.bias.grad is kept
    assert torch.equal(kept, torch.ones(SHAPE[0]))
    assert transformer.embed.weight.grad is None
    assert gradient_conflict(transformer.eval(), samples, 2, 4) == found
    assert not transformer.training


def test_one_domain_has_no_pairs() -> None:
    found = gradient_conflict(_transformer(_config(num_experts=0)), _samples(a=_random(1, 1)), 4, 2)
    assert found["shared"] == {"cosine": {}, "ratio": {}, "within": {"a": None}}  # one sample cannot be halved


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_cosines_are_bounded_and_independent_of_a_domains_scale(seed: int, scale: float) -> None:
    """With a zero head, a target ``scale`` times as far away gives a gradient ``scale`` times as large."""
    transformer = _transformer(_config(num_experts=0), head=0)
    a, b, c = (_random(2, seed + n) for n in range(3))
    far = [_window(z[:2], z[1] + scale * (z[2] - z[1])) for z in b]
    near, found = (gradient_conflict(transformer, _samples(a=a, b=z, c=c), 2, 2)["rest"] for z in (b, far))
    assert list(found["cosine"]) == [f"{one}|{other}" for one, other in combinations("abc", 2)]
    assert all(-1 <= cosine <= 1 for cosine in [*found["cosine"].values(), *found["within"].values()])
    assert found["cosine"] == pytest.approx(near["cosine"], abs=1e-4)
    assert found["ratio"]["a|b"] * scale == pytest.approx(near["ratio"]["a|b"], rel=1e-4)
    assert found["ratio"]["b|c"] / scale == pytest.approx(near["ratio"]["b|c"], rel=1e-4)


def test_conflict_is_measured_over_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    config, samples = _config(), _samples(a=_random(2, 1), b=_random(2, 2))
    writer = CheckpointWriter(tmp_path / "checkpoints", 0, 1, 9, 0, "test")
    expected = []
    for step, head in ((9, 0.3), (10, 0.6)):
        transformer = _transformer(config, head)
        fragments, shapes = model_fragments(transformer, ExpertParallel())
        writer.save(step, fragments, shapes, {}, {"config": config.model_dump()})
        writer.finish()
        expected.append({"step": step, "groups": gradient_conflict(transformer, samples, 2, 3)})
    assert gradients_over_training(tmp_path, config, samples, 2) == expected
    assert gradients_over_training(tmp_path / "none", config, samples, 2) == []
    (next((tmp_path / "checkpoints" / "10").glob("*.safetensors"))).write_bytes(b"")
    with pytest.raises(UserError, match="10 is refused"):
        gradients_over_training(tmp_path, config, samples, 2)
