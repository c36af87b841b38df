"""The latent transformer: positions, residual form, patches, routing records, seeds."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.model import LatentTransformer
from shodh_moe.model.attention import axial_rotary, rotate
from shodh_moe.model.inputs import patchify, unpatchify
from shodh_moe.model.norm import available_norm, make_norm
from shodh_moe.model.routers import ONE_SAMPLE, Slots, make_router
from shodh_moe.model.transformer import Prediction
from shodh_moe.parallel import ExpertParallel
from tests.tiny import LAYER

SMALL = ModelConfig(dim=24, depth=2, heads=2, norms="pre", moe=MoEConfig(**LAYER, expert_hidden=16))


def _model(config: ModelConfig = SMALL, seed: int = 0) -> LatentTransformer:
    return LatentTransformer(config, latent_channels=5, latent_grid=[4, 4, 2], seed=seed, ep=ExpertParallel())


def _inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, 5, 4, 4, 2, generator=g), torch.randn(batch, 5, 4, 4, 2, generator=g)


def test_before_training_the_model_is_persistence():
    history, geometry = _inputs()
    assert torch.equal(_model()(history, geometry).latent_BCxyz, history[:, -1])


def test_every_parameter_gets_a_gradient():
    """In particular the router, which learns only through the gate that scales its expert's output."""
    model = _model()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    out = model(*_inputs())
    out.latent_BCxyz.square().mean().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without_gradient == []


def test_routing_counts_every_token_of_every_layer():
    out = _model()(*_inputs(batch=3))
    assert len(out.routing) == 2
    assert all(layer.expert_N.shape == (3 * 32,) for layer in out.routing)


def test_training_drops_tokens_over_capacity_and_evaluation_drops_none():
    config = SMALL.model_copy(update={"moe": MoEConfig(**LAYER, expert_hidden=16, capacity_factor=0.5, min_capacity=1)})
    model = _model(config)
    assert not all(layer.kept_N.all() for layer in model(*_inputs()).routing)
    assert all(layer.kept_N.all() for layer in model.eval()(*_inputs()).routing)


def test_unpatchify_inverts_patchify():
    x = torch.randn(2, 5, 4, 4, 2)
    assert torch.equal(unpatchify(patchify(x, 2), 2, x.shape), x)
    # token 1 of a patch-1 grid is the neighbour along the last axis
    assert torch.equal(patchify(x, 1)[:, 1], x[:, :, 0, 0, 1])


def test_a_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(UserError, match=r"not divisible by model\.patch 4"):
        _model(SMALL.model_copy(update={"patch": 4}))


def test_attention_scores_depend_only_on_relative_position():
    angles = axial_rotary([3, 3, 3], head_width=24)
    q, k = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)

    def score(a: int, b: int) -> float:
        turned_q = rotate(q[None, None, None], angles[a : a + 1])
        turned_k = rotate(k[None, None, None], angles[b : b + 1])
        return float((turned_q * turned_k).sum())

    assert score(0, 13) == pytest.approx(score(13, 26))  # (0,0,0)->(1,1,1) and (1,1,1)->(2,2,2)
    assert score(0, 1) != pytest.approx(score(0, 3))  # along z and along y are different


def test_same_seed_same_weights():
    a, b, c = _model(seed=0), _model(seed=0), _model(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].moe.experts.down_LFD, c.blocks[0].moe.experts.down_LFD)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_cosine_and_linear_routers(kind):
    router = make_router(RouterConfig(kind=kind, temperature=0.1), 8, 3)
    x = torch.randn(10, 8)
    once, twice = (router(scale * x, ONE_SAMPLE, Slots(10)) for scale in (1, 2))
    assert torch.equal(once.expert_N, twice.expert_N)
    if kind == "cosine":  # a cosine does not depend on the token's length, and the logits are at most 1 / tau
        torch.testing.assert_close(twice.gate_N, once.gate_N)
        assert once.z_loss.sqrt() <= 10 + math.log(3)
    else:
        logits = x @ router.projection.weight.T
        torch.testing.assert_close(twice.gate_N, torch.softmax(2 * logits, 1).amax(1))


def test_the_router_temperature_has_a_minimum():
    router = make_router(RouterConfig(temperature=0.1, min_temperature=0.05), 8, 3)
    router.log_temperature.data.fill_(-100.0)
    assert router(torch.randn(10, 8), ONE_SAMPLE, Slots(10)).z_loss.sqrt() <= 20 + math.log(3)


def test_sandwich_norms_bound_what_a_branch_adds():
    """With pre-norms alone, a step that scales a branch's weights scales what it adds to the residual stream."""
    sizes = {}
    for norms in ("pre", "sandwich"):
        model = _model(SMALL.model_copy(update={"norms": norms}))
        added: list[torch.Tensor] = []
        model.norm.register_forward_pre_hook(lambda _, inputs, added=added: added.append(inputs[0]))
        for scale in (1, 100):
            for block in model.blocks:
                block.attention.out.weight.data *= scale
                block.moe.shared[0].down.weight.data *= scale
            model(*_inputs())
        sizes[norms] = [float(x.detach().square().mean().sqrt()) for x in added]
    assert sizes["pre"][1] > 5 * sizes["pre"][0]
    assert sizes["sandwich"][1] < 1.5 * sizes["sandwich"][0]


# Norm back ends, activation checkpointing, autocast.


def _trained_like(**options: Any) -> LatentTransformer:
    """A model whose output depends on all its parameters, with few enough slots that some tokens are dropped."""
    moe = MoEConfig(**LAYER, num_experts=3, expert_hidden=16, capacity_factor=0.8, min_capacity=1)
    config = SMALL.model_copy(update={"moe": moe})
    model = LatentTransformer(
        config, latent_channels=5, latent_grid=[4, 4, 2], seed=0, ep=ExpertParallel(), **options
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def _loss(out: Prediction) -> torch.Tensor:
    return out.latent_BCxyz.square().mean() + sum(0.01 * r.balance_loss + 0.001 * r.z_loss for r in out.routing)


def _saved_bytes(model: LatentTransformer) -> tuple[int, Prediction]:
    """Return the bytes that autograd keeps between the two passes, without parameters, and the prediction."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*_inputs())
    return sum(kept.values()), out


@pytest.mark.parametrize("dropless", [False, True])
def test_activation_checkpointing_changes_only_memory(dropless):
    models = [_trained_like(activation_checkpointing=on) for on in (False, True)]
    for model in models:
        for layer in model.moe_layers:
            layer.config = layer.config.model_copy(update={"dropless": dropless})
    (plain_bytes, plain), (recomputed_bytes, recomputed) = (_saved_bytes(model) for model in models)
    assert torch.equal(plain.latent_BCxyz, recomputed.latent_BCxyz)
    for one, other in zip(plain.routing, recomputed.routing, strict=True):
        assert torch.equal(one.expert_N, other.expert_N)
        assert torch.equal(one.kept_N, other.kept_N)
        assert one.kept_N.all() == dropless
        assert torch.equal(one.balance_loss, other.balance_loss)
    assert recomputed_bytes < plain_bytes / 5
    _loss(plain).backward()
    _loss(recomputed).backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_losses_of_recomputed_blocks_reach_the_router():
    model = _trained_like(activation_checkpointing=True)
    sum(r.balance_loss + r.z_loss for r in model(*_inputs()).routing).backward()
    assert all(layer.router.prototypes_ER.grad.any() for layer in model.moe_layers)


def test_nothing_is_recomputed_outside_training(monkeypatch):
    model = _trained_like(activation_checkpointing=True).eval()
    monkeypatch.setattr("shodh_moe.model.transformer.checkpoint", None)
    model(*_inputs())
    with torch.no_grad():
        model.train()(*_inputs())


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_autocast_is_close_to_float32(dropless, recompute):
    model = _trained_like(activation_checkpointing=recompute)
    for layer in model.moe_layers:
        layer.config = layer.config.model_copy(update={"dropless": dropless})
    history, geometry = _inputs()
    wide = model(history, geometry)
    _loss(wide).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(history, geometry)
        loss = _loss(narrow)
    loss.backward()
    assert narrow.latent_BCxyz.dtype == torch.float32
    change, expected = (out.latent_BCxyz - history[:, -1] for out in (narrow, wide))
    assert not torch.equal(change, expected)  # the products were narrow
    # A nearly tied token may take another expert, so compare the norm of all tokens, not each token.
    assert (change - expected).norm() < 0.03 * expected.norm()
    assert all(
        (a.expert_N == b.expert_N).float().mean() > 0.95 for a, b in zip(narrow.routing, wide.routing, strict=True)
    )
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - gradients[name]).norm() < 0.15 * gradients[name].norm(), name


def test_torchs_norm_is_the_default():
    assert available_norm("torch", "cuda") == "torch"
    assert available_norm("auto", "cpu") == "torch"
    x = torch.randn(4, 24)
    assert torch.equal(make_norm(24, "torch")(x), torch.nn.RMSNorm(24)(x))


@pytest.fixture
def packages(monkeypatch):
    """A function that replaces installed modules by modules of given names and contents."""

    def install(**modules: dict[str, Any]) -> None:
        for name, content in modules.items():
            module = types.ModuleType(name.replace("__", "."))
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    for name in ("apex", "apex.normalization", "apex.optimizers", "fused_layer_norm_cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    return install


class _Apex(torch.nn.RMSNorm):
    """Stands for Apex's class, as far as it is used; its default eps differs."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)


NVIDIA = {
    "apex": {},
    "apex__normalization": {"FusedRMSNorm": _Apex},
    "apex__optimizers": {"FusedAdam": object},
    "fused_layer_norm_cuda": {},
}


def test_an_unrelated_apex_is_not_mistaken_for_nvidias(packages):
    packages(apex={"__version__": "0.9.10"})
    with pytest.raises(UserError, match="another project's"):
        available_norm("apex", "cuda")
    assert available_norm("auto", "cuda") == "torch"


def test_apex_without_its_cuda_extensions_is_refused(packages):
    packages(**{name: content for name, content in NVIDIA.items() if name != "fused_layer_norm_cuda"})
    with pytest.raises(UserError, match="CUDA extensions"):
        available_norm("apex", "cuda")


def test_nvidias_apex_is_used_on_request(packages, monkeypatch):
    packages(**NVIDIA)
    assert available_norm("apex", "cuda") == "apex"
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        available_norm("apex", "cpu")
    apex_model, torch_model = _trained_like(norm="apex"), _trained_like()
    norms = [m for m in apex_model.modules() if isinstance(m, torch.nn.RMSNorm)]
    assert len(norms) == 2 * 4 + 1
    assert all(isinstance(m, _Apex) for m in norms)
    apex_model.load_state_dict(torch_model.state_dict())  # the same names
    assert torch.equal(apex_model(*_inputs()).latent_BCxyz, torch_model(*_inputs()).latent_BCxyz)
