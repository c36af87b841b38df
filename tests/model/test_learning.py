"""What learns in a fine-tuning: gradients and optimizer marks of every parameter, low-rank additions, grown routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shodh_moe.base.parameters import marks
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.learning import prepare_fine_tuning, routers_learn
from shodh_moe.model.low_rank import add_low_rank, fold
from shodh_moe.model.routers import Slots, make_router
from shodh_moe.model.routing import routing_of
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training.balance import update_biases
from tests.tiny import LAYER

MODEL = {"dim": 24, "depth": 2, "heads": 2}
DENSE = {"num_experts": 0, "shared_experts": 1}
PATHS = {"num_experts": 3, "scope": "path", "attention": "low_rank", "attention_rank": 2, "expert_hidden": 8}


def network(moe: dict[str, Any], ep: ExpertParallel | None = None) -> LatentTransformer:
    config = ModelConfig.model_validate({**MODEL, "moe": moe})
    model = LatentTransformer(config, 5, 0, ep or ExpertParallel())
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # parts that start at zero would have no gradient behind them
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    if model.path is not None:  # so that every path is taken
        rows, _ = model.path.features(model.embedding_inputs(*inputs()), (2, 2, 2))
        model.path.router.start(rows, 0)
    return model


def inputs(samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(samples, 2, 5, 2, 2, 2, generator=random), torch.randn(samples, 5, 2, 2, 2, generator=random)


def backward(model: LatentTransformer) -> None:
    model.eval()(*inputs()).latent_BCxyz.square().mean().backward()


def everywhere_routed(model: LatentTransformer) -> None:
    assert model.path is not None
    assert len(model.eval()(*inputs()).routing[0].expert_N.unique()) == 3


def test_only_the_last_path_learns() -> None:
    model = network(PATHS)
    everywhere_routed(model)
    prepare_fine_tuning(model, FineTuningConfig(train="expert"), ExpertParallel())
    backward(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if marks(parameter).per_expert:
            assert not parameter.grad[:2].any(), name
            assert parameter.grad[2].any(), name
            assert (marks(parameter).decay, marks(parameter).lr_scale) == (False, 1.0)
        else:
            assert not parameter.grad.any(), name
            assert marks(parameter).lr_scale == 0


def test_only_the_paths_of_the_samples_learn() -> None:
    model = network({**PATHS, "router": {"kind": "oracle"}})
    prepare_fine_tuning(model, FineTuningConfig(train="paths"), ExpertParallel())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # As the engine makes its groups: held parameters have the rate 0, and none of the others decays.
    assert not any(marks(parameter).decay and marks(parameter).lr_scale for parameter in model.parameters())
    groups = [{"params": [p], "lr": 0.1 * marks(p).lr_scale, "weight_decay": 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs(4), Context(4, torch.tensor([1, 1, 1, 1]))).latent_BCxyz.square().mean().backward()
        optimizer.step()
    learned = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            assert marks(parameter).per_expert, name
            assert [e for e in range(3) if not torch.equal(parameter[e], before[name][e])] == [1], name
            learned.add(name.split(".")[0])
        elif marks(parameter).per_expert:
            assert parameter.grad.abs().max() == 0, name
    assert learned == {"embed", "blocks", "head"}


def test_only_a_model_with_paths_trains_its_paths() -> None:
    for moe in (LAYER, DENSE):
        with pytest.raises(ValueError, match=r"finetune\.train paths needs a model with paths"):
            Config.model_validate({"model": {"moe": moe}, "finetune": {"train": "paths"}})


def test_biases_move_only_where_the_router_learns() -> None:
    learning = [
        train for train in ("all", "expert", "paths", "lora", "router") if routers_learn(FineTuningConfig(train=train))
    ]
    assert learning == ["all", "router"]
    assert routers_learn(None)


def test_ranks_without_the_last_expert_have_the_same_optimizer_groups() -> None:
    moe = {**PATHS, "num_experts": 4}
    groups = []
    for rank in (0, 1):
        ep = ExpertParallel(2, rank)
        model = network(moe, ep)
        prepare_fine_tuning(model, FineTuningConfig(train="expert"), ep)
        groups.append({name: (marks(p).decay, marks(p).lr_scale) for name, p in model.named_parameters()})
        experts = model.blocks[0].moe.experts.down_LFD
        experts.sum().backward()
        assert [bool(part.any()) for part in experts.grad] == [False, rank == 1]
        ep.placement, experts.grad = [0, 3, 1, 2], None  # as when experts move to follow their load
        experts.sum().backward()
        assert [bool(part.any()) for part in experts.grad] == [False, rank == 0]
    assert groups[0] == groups[1]


def test_only_the_router_learns() -> None:
    model = network(PATHS)
    prepare_fine_tuning(model, FineTuningConfig(train="router"), ExpertParallel())
    backward(model)
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) == name.startswith("path.router."), name


@pytest.mark.parametrize("moe", [PATHS, {**LAYER, "num_experts": 2, "expert_hidden": 8}, DENSE])
def test_low_rank_additions_start_at_zero_learn_alone_and_fold(moe: dict[str, Any]) -> None:
    model = network(moe).eval()
    expected = model(*inputs()).latent_BCxyz
    names = set(model.state_dict())
    prepare_fine_tuning(model, FineTuningConfig(train="lora", rank=3), ExpertParallel())
    torch.testing.assert_close(model(*inputs()).latent_BCxyz, expected, rtol=0, atol=0)
    backward(model)
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) == name.endswith(".up"), name  # `down` learns after the first step
        assert marks(parameter).lr_scale == (1 if name.endswith((".up", ".down")) else 0), name
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    moved = model(*inputs()).latent_BCxyz
    assert float((moved - expected).detach().abs().max()) > 1e-3
    folded = fold(model.state_dict())
    assert set(folded) == names
    plain = network(moe).eval()
    plain.load_state_dict(folded)
    torch.testing.assert_close(plain(*inputs()).latent_BCxyz, moved, rtol=1e-5, atol=1e-6)
    assert fold(plain.state_dict()).keys() == names


def test_additions_of_experts_stay_with_their_rank() -> None:
    model = network(PATHS)
    add_low_rank(model, 2)
    shard = model.blocks[0].moe.experts.parametrizations.gate_up_LDF[0]
    assert [marks(p).sharded for p in (shard.down, shard.up)] == [True, True]
    assert shard.down.shape == (3, 24, 2)
    assert shard.up.shape == (3, 2, 16)
    linear = model.embed.parametrizations.weight[0]
    assert (linear.down.shape, linear.up.shape) == ((2, 15), (24, 2))


@pytest.mark.parametrize("balance", ["loss", "bias"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_grown_router_decides_as_before_except_for_the_rows_it_takes(kind: str, balance: str) -> None:
    router = {"kind": kind, "balance": balance}
    before = ModelConfig.model_validate({**MODEL, "moe": {**PATHS, "router": router}}).moe
    after = before.model_copy(update={"num_experts": 5, "router": before.router.model_copy(update={"added": [2, 1]})})
    old, new = make_router(before.router, 7, 3), make_router(after.router, 7, 5)
    if balance == "bias":
        old.bias_E += torch.tensor([0.2, 0.0, 0.1])
    new.base.load_state_dict(old.state_dict())
    random = torch.Generator().manual_seed(0)
    x_MF = torch.nn.functional.pad(torch.randn(400, 6, generator=random), (0, 1), value=1.0)
    # The first added expert takes rows with x_0 > 0 and x_1 > 0, the second one those with x_2 > 1.
    new.margins_KF.data.zero_()
    new.margins_KF.data[[0, 1, 2], [0, 1, 2]] = 1
    new.margins_KF.data[2, -1] = -1
    row_N = torch.arange(400).repeat_interleave(3)
    slots = Slots(2000, row_N=row_N)
    a, b = (router(x_MF, Context(400), slots) for router in (old, new))
    first, second = (x_MF[:, 0] > 0) & (x_MF[:, 1] > 0), x_MF[:, 2] > 1
    taken_N = torch.where(second, 4, torch.where(first, 3, -1))[row_N]
    stays = taken_N < 0
    assert stays.any()
    assert torch.equal(b.expert_N, torch.where(stays, a.expert_N, taken_N))
    assert torch.equal(b.gate_N, torch.where(stays, a.gate_N, 1.0))
    assert torch.equal(b.kept_E, b.expert_N.bincount(minlength=5))
    for expert in range(5):  # an expert's tokens fill its slots in order
        own = b.slot_N[b.expert_N == expert]
        assert torch.equal(own, torch.arange(len(own)))
    assert torch.equal(b.mean_p_E[:3], a.mean_p_E)
    assert b.mean_p_E[3:].tolist() == [0, 0]
    if balance == "bias":  # it belongs to the experts before the growth, and evens out their load alone
        load_E = b.routed_E[:3]
        expected = old.bias_E + 0.01 * torch.sign(load_E.sum() - 3 * load_E)
        update_biases([new], [[routing_of(b)]], 0.01)
        assert torch.equal(new.bias_E, expected)
        assert torch.equal(new.state_dict()["base.bias_E"], expected)
    b.gate_N.sum().backward()
    assert new.margins_KF.grad is not None
    assert not new.margins_KF.grad.any()


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 3, "scope": "layer", "router": {"added": [1]}},
        {"num_experts": 2, "router": {"added": [1, 1]}},
        {"num_experts": 3, "top_k": 2, "router": {"added": [1]}},
    ],
)
def test_added_experts_need_paths_and_an_expert_before_them(moe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"router\.added"):
        ModelConfig.model_validate({**MODEL, "moe": moe})
