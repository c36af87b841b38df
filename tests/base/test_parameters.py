"""Marks of parameters: the defaults, and the marks of the latent transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shodh_moe.base.parameters import Marks, mark, marks
from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from tests.tiny import LAYER


def test_matrices_decay_and_vectors_do_not():
    assert marks(nn.Parameter(torch.zeros(2, 2))) == Marks(decay=True, sharded=False, lr_scale=1.0, group="rest")
    assert not marks(nn.Parameter(torch.zeros(2))).decay


def test_a_mark_keeps_other_marks_and_survives_a_dtype_change():
    module = nn.Linear(2, 2)
    mark(module.weight, lr_scale=0.5)
    mark(module.weight, group="head")
    module.double()
    assert marks(module.weight) == Marks(decay=True, lr_scale=0.5, group="head")
    with pytest.raises(TypeError, match="colour"):
        mark(module.weight, colour="red")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_transformer_marks_its_parameters(frozen):
    """The marks equal the former decisions by parameter name."""
    moe = MoEConfig(**LAYER, expert_hidden=16, router=RouterConfig(frozen=frozen))
    config = ModelConfig(dim=24, depth=2, heads=2, moe=moe)
    model = LatentTransformer(config, 5, 0, ExpertParallel())
    seen = set()
    for name, parameter in model.named_parameters():
        found = marks(parameter)
        assert found.sharded == (".experts." in name)
        assert found.decay == (parameter.dim() >= 2 and "prototypes" not in name)
        assert found.lr_scale == (0 if frozen and ".router." in name else 1)
        if ".attention." in name or ".attention_norm." in name:
            group = "attention"
        else:
            parts = {"shared": "shared", "router": "router", "experts": "expert"}
            group = next((to for part, to in parts.items() if f".moe.{part}." in name), "rest")
        assert found.group == group
        seen.add(group)
    assert seen == {"attention", "shared", "router", "expert", "rest"}
