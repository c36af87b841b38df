"""Every back end is the same AdamW, and their states are interchangeable."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import TrainingConfig
from shodh_moe.training.optimizer import make_optimizer, make_state, resolve_optimizer, set_updates, updates


def _groups(seed: int = 0) -> list[dict]:
    torch.manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (33,))]
    return [
        {"params": weights[:1], "weight_decay": 0.1, "name": "decay"},
        {"params": weights[1:], "weight_decay": 0.0, "name": "no_decay"},
    ]


def _train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


CONFIG = TrainingConfig(learning_rate=1e-2)


def _back_ends() -> list:
    can_compile = pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="no C++ compiler")
    # DeepSpeed compiles its optimizer at first use: 60 s on a quiet machine, over two minutes beside other tests.
    return ["torch", pytest.param("deepspeed", marks=[can_compile, pytest.mark.slow, pytest.mark.timeout(600)])]


@pytest.mark.parametrize("choice", _back_ends())
def test_each_back_end_is_adamw(choice):
    """Compare with PyTorch's plain loop over steps 1 to 5, from a state created in advance."""
    optimizer = make_optimizer(choice, _groups(), CONFIG)
    make_state(optimizer)
    assert updates(optimizer) == 0
    plain = torch.optim.AdamW(_groups(), lr=1e-2, betas=(CONFIG.betas[0], CONFIG.betas[1]), foreach=False, fused=False)
    _train(optimizer, range(5))
    _train(plain, range(5))
    assert updates(optimizer) == 5
    for actual, expected in zip(_weights(optimizer), _weights(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", _back_ends())
def test_state_moves_between_back_ends(choice):
    """PyTorch makes three steps; another back end makes two more with its moments and step count."""
    first, unbroken, second = (make_optimizer(c, _groups(), CONFIG) for c in ("torch", "torch", choice))
    for optimizer in (first, unbroken, second):
        make_state(optimizer)
    _train(first, range(3))
    _train(unbroken, range(5))
    for group, other in zip(first.param_groups, second.param_groups, strict=True):
        for parameter, copy in zip(group["params"], other["params"], strict=True):
            copy.data.copy_(parameter.data)
            for key in ("exp_avg", "exp_avg_sq"):
                second.state[copy][key].copy_(first.state[parameter][key])
    set_updates(second, updates(first))
    _train(second, range(3, 5))
    for actual, expected in zip(_weights(second), _weights(unbroken), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_apex_on_pypi_is_not_mistaken_for_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    assert resolve_optimizer(TrainingConfig(optimizer="auto")) == "torch"
    with pytest.raises(UserError, match="NVIDIA's apex is not installed"):
        resolve_optimizer(TrainingConfig(optimizer="apex"))


def test_float64_needs_a_float64_kernel():
    with pytest.raises(UserError, match="deepspeed has no float64 kernel"):
        resolve_optimizer(TrainingConfig(optimizer="deepspeed", precision="float64"))
    assert resolve_optimizer(TrainingConfig(precision="float64")) == "torch"
