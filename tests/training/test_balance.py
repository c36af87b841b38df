"""Balance from the counts of all ranks, and by a bias: alike at every layout, resumable, and evening out the load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.config import Config, MoEConfig, RouterConfig
from shodh_moe.model import MoE
from shodh_moe.model.routers import make_router
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training import losses
from shodh_moe.training.balance import update_biases
from tests.training.launch import launch
from tests.training.synthetic import write_case

WORKER = Path(__file__).with_name("worker_pretrain.py")
SETTINGS = ["training.precision=float64", "model.moe.num_experts=4", "model.moe.dropless=true"]
BIAS = ["model.moe.router.balance=bias", "model.moe.router.bias_rate=0.02"]
CASES = {
    "global": ["model.moe.router.balance=global", "model.moe.router.balance_weight=0.5", "model.moe.top_k=2"],
    "bias": BIAS,
    # The start from k-means depends on the size of the micro-batch, the random one does not.
    "bias along paths": [*BIAS, "model.moe.scope=path", "model.moe.router.start=random"],
}
# Every layout trains on the same global batch of 8.
LAYOUTS = {
    "one": (1, ["training.batch_size=8"]),
    "two": (2, ["training.batch_size=4", "parallel.ep_size=1"]),
    "experts": (2, ["training.batch_size=4", "parallel.ep_size=2", "parallel.zero_stage=1"]),
}


def _train(folder: Path, run: Path, case: str, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    done = launch(ranks, WORKER, str(folder), str(run), "auto", *SETTINGS, *CASES[case], *settings)
    assert done.returncode == 0, done.stdout + done.stderr


def _tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / str(step))
    return {name: reader.tensor(name) for name in reader.names()}


def _losses(run: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "prediction_loss", "balance_loss", "z_loss", "grad_norm")
    return [[record[key] for key in keys] for record in records if record["kind"] == "train"]


def _check_same(run: Path, other: Path) -> None:
    a, b = _tensors(run, 6), _tensors(other, 6)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-8, atol=1e-12, msg=name)
        if name.endswith("bias_E"):
            assert torch.equal(b[name], value)
            assert len(value.unique()) > 1


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "layouts"), [("global", ["two", "experts"]), ("bias", ["experts"]), ("bias along paths", ["experts"])]
)
def test_one_and_two_ranks_train_alike(case, layouts, tmp_path):
    folder, one = write_case(tmp_path / "case"), tmp_path / "one"
    _train(folder, one, case, "one")
    assert any(name.endswith("bias_E") for name in _tensors(one, 3)) == (case != "global")
    for layout in layouts:
        _train(folder, tmp_path / layout, case, layout)
        torch.testing.assert_close(_losses(tmp_path / layout), _losses(one), rtol=1e-9, atol=0)
        _check_same(one, tmp_path / layout)
    if case == "bias":  # one rank goes on from the checkpoint of two
        resumed = tmp_path / "resumed"
        shutil.copytree(tmp_path / "experts", resumed)
        shutil.rmtree(resumed / "checkpoints" / "6")
        (resumed / "checkpoints" / "latest").write_text("3\n")
        _train(folder, resumed, case, "one")
        _check_same(one, resumed)


def _layer(balance: str, scope: str = "layer", **moe: int) -> MoE:
    torch.manual_seed(0)
    router = RouterConfig(balance=balance, kind="linear")
    config = MoEConfig(scope="layer", num_experts=4, expert_hidden=6, router=router, **moe)
    return MoE(8, config, ExpertParallel(), 0, 0).double()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_bias_evens_out_the_load_and_changes_no_gate(top_k):
    layer = _layer("bias", top_k=top_k)
    torch.nn.init.normal_(layer.router.projection.weight, std=0.3)
    layer.router.projection.weight.data[3, 0] = 2.0
    x_ND = torch.randn(400, 8, dtype=torch.float64)
    x_ND[:, 0] = 1  # expert 3 is the best one for most tokens
    first = layer(x_ND)[1]
    assert first.routed_E[3] > 350
    for _ in range(100):
        update_biases([layer.router], [[layer(x_ND)[1]]], 0.01)
    even = 100 * top_k
    routing = layer(x_ND)[1]
    assert (routing.routed_E - even).abs().max() < 0.3 * even
    p_NE = layer.router.projection(x_ND).softmax(1)
    torch.testing.assert_close(routing.gate_N, p_NE.gather(1, routing.expert_N[:, None])[:, 0])
    torch.testing.assert_close(routing.mean_p_E, first.mean_p_E)


def test_one_router_for_all_layers_is_updated_once_from_all_micro_batches():
    layer = _layer("bias")
    routing = layer(torch.randn(50, 8, dtype=torch.float64))[1]
    skewed = routing._replace(routed_E=torch.tensor([20, 10, 10, 0]))
    other = routing._replace(routed_E=torch.tensor([0, 10, 11, 19]))
    update_biases([layer.router] * 2, [[skewed] * 2, [other] * 2], 0.5)
    assert layer.router.bias_E.tolist() == [0.0, 0.0, -0.5, 0.5]  # loads 20, 20, 21, 19


def test_the_global_loss_of_two_ranks_is_that_of_their_tokens_together(monkeypatch):
    """The mean over ranks of the loss and its gradient, where each rank alone is as uneven as can be."""
    layer = _layer("global")
    layer.router.projection.weight.data *= 4
    x_ND = torch.randn(400, 8, dtype=torch.float64)
    halves = x_ND[layer(x_ND)[1].expert_N.argsort()].chunk(2)  # every expert's tokens are on one rank, mostly
    config = Config.model_validate(
        {"model": {"moe": {"scope": "layer", "router": {"balance": "global", "balance_weight": 1.0}}}}
    )

    def balance(x_ND: torch.Tensor) -> torch.Tensor:
        predicted = torch.tensor(2.0, dtype=torch.float64)
        return losses.add_router_losses(predicted, predicted.reshape(1, 1), [layer(x_ND)[1]], config).balance_loss

    whole = balance(x_ND)
    (expected,) = torch.autograd.grad(whole, layer.router.projection.weight)
    total = sum(layer(half)[1].routed_E for half in halves).double()
    table = torch.cat([torch.tensor([4.0, 2.0], dtype=torch.float64), total])
    monkeypatch.setattr(losses, "sum_over_ranks", lambda values, group: table)
    mean = (balance(halves[0]) + balance(halves[1])) / 2
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, layer.router.projection.weight)[0], expected)
    local = sum(layer(half)[1].balance_loss for half in halves) / 2
    assert local > 1.2 * whole


def test_with_a_bias_there_is_no_balance_loss():
    layer, error_BU = _layer("bias"), torch.ones(2, 1, dtype=torch.float64)
    routing = layer(torch.randn(50, 8, dtype=torch.float64))[1]
    moe = {"scope": "layer", "router": {"balance": "bias", "balance_weight": 1.0, "z_weight": 0.5}}
    found = losses.add_router_losses(
        error_BU.mean(), error_BU, [routing], Config.model_validate({"model": {"moe": moe}})
    )
    torch.testing.assert_close(found.loss, 1 + 0.5 * found.z_loss)
    assert found.balance_loss > 1


def test_controls_that_do_not_learn_have_no_bias():
    for settings, words in (({"kind": "oracle"}, "kind oracle"), ({"frozen": True}, "frozen true")):
        with pytest.raises(ValidationError, match=f"balance bias would change the decisions of the control {words}"):
            RouterConfig(balance="bias", **settings)
    assert make_router(RouterConfig(), 8, 4).bias_E is None
    assert "bias_E" not in make_router(RouterConfig(balance="global"), 8, 4).state_dict()
