"""Merging in memory equals the merge command bit for bit, and the command's output is an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.ccm.expert import Expert, compose, from_anchor, load_expert
from tests.ccm.synthetic import expert_config, initial, make_expert, save_ends
from tests.merging.models import merged, same_bits


def _same(expert: Expert, state: dict[str, torch.Tensor]) -> bool:
    return same_bits({name: tensor.detach() for name, tensor in expert.weights().items()}, state)


@pytest.mark.parametrize("alpha", [-1.5, -1.0, -0.3, 0.0, 0.85, 1.0])
def test_compose_equals_ccm_of_the_command(ends: tuple[Expert, Expert], alpha: float, tmp_path: Path) -> None:
    paths = save_ends(tmp_path, ends)
    state = merged(tmp_path, "ccm", paths, parameters={"alpha": alpha}, format="safetensors", output=tmp_path / "out")
    composed = compose(*ends, alpha)
    assert _same(composed, state)
    if abs(alpha) == 1:
        assert _same(ends[0 if alpha < 0 else 1], state)
    # The result is a new network; those of the experts are not changed.
    assert all(composed.weights()[name] is not tensor for name, tensor in ends[0].weights().items())


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"weight": 0.5, "lambda": 0.8}),
        ("ties", {"weight": 1, "density": 0.3, "lambda": 1.1}),
        ("dare", {"weight": 0.5, "density": 0.4, "seed": 3}),
    ],
)
def test_from_anchor_equals_the_command(
    ends: tuple[Expert, Expert], method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    anchor = make_expert(expert_config(), 0)
    # The command sorts models by path, and DARE's masks depend on the order.
    base, *models = save_ends(tmp_path, [anchor, *ends], names=("anchor", "a", "b"))
    words: dict[str, Any] = {"parameters": parameters, "base_model": base, "format": "safetensors"}
    state = merged(tmp_path, method, models, **words, output=tmp_path / "out")
    assert _same(from_anchor(method, anchor, list(ends), parameters), state)


def test_a_merged_checkpoint_is_an_expert(ends: tuple[Expert, Expert], tmp_path: Path) -> None:
    merged(tmp_path, "ccm", save_ends(tmp_path, ends), parameters={"alpha": 0.6}, output=tmp_path / "out")
    found, composed = load_expert(tmp_path / "out"), compose(*ends, 0.6)
    assert found.scale == ends[0].scale
    assert found.config == ends[0].config
    assert _same(composed, found.weights())
    torch.testing.assert_close(found.predict(initial(0), 2, 0.0), composed.predict(initial(0), 2, 0.0), rtol=0, atol=0)
