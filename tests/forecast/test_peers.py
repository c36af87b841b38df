"""The peers: shapes, seeds, files, training by wall time, and forecasts that feed predictions back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.data import FieldStats, list_trajectories, read_trajectory
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.forecast.budget import LEAST, WARM_UP, TimeBudget, learning_rate
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import Flow, Windows
from shodh_moe.forecast.forecasters import of_peer
from shodh_moe.forecast.peers import PeerModel, make_peer
from shodh_moe.forecast.plan import Training
from shodh_moe.forecast.train_peer import train_peer
from shodh_moe.operators import DPOT3d, DPOTSize, UNet3d
from tests.forecast.tiny import LIBRARY, PEERS, tree
from tests.tiny import write_dataset

STATS = FieldStats(velocity_rms=2.0, pressure_rms=4.0, velocity_delta_rms=1.0, pressure_delta_rms=1.0)


def bench_with(folder: Path, **changes: Any) -> ForecastConfig:
    return ForecastConfig.model_validate(tree(folder, **changes))


def peer_network(folder: Path, name: str, seed: int = 0) -> nn.Module:
    if name in LIBRARY:
        pytest.importorskip("neuralop", reason="needs neuraloperator, of the extra forecast")
    bench = bench_with(folder, peers={**PEERS, **LIBRARY})
    return make_peer(dict(bench.peers.items())[name], 2, seed)


@pytest.mark.parametrize("name", ["fno", "uno", "unet", "dpot"])
def test_a_peer_maps_the_history_to_a_change(name: str, tmp_path: Path) -> None:
    network = peer_network(tmp_path, name)
    given = torch.randn(2, 9, 16, 16, 16)
    change = network(given)
    assert change.shape == (2, 4, 16, 16, 16)
    assert change.dtype == torch.float32
    change.square().mean().backward()
    gradients = [one.grad for one in network.parameters() if one.grad is not None]
    assert gradients
    assert all(one.isfinite().all() for one in gradients)
    same, other = peer_network(tmp_path, name), peer_network(tmp_path, name, seed=1)
    pairs = list(zip(network.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two, _ in pairs)
    assert not all(torch.equal(one, three) for one, _, three in pairs)


@pytest.mark.parametrize("name", ["fno", "unet", "dpot"])
def test_a_peer_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    model, other = (PeerModel(peer_network(tmp_path, name, seed), 2, STATS) for seed in (0, 1))
    given, solid = torch.randn(2, 2, 4, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16)
    model(given, solid)  # sets the statistics of batch norms
    model.save(tmp_path / "weights.safetensors")
    other.load(tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(given, solid), other.eval()(given, solid))


def test_networks_of_ours_refuse_grids_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="12 x 12 x 12 cannot be halved 3 times"):
        UNet3d(1, 1, 2, 3)(torch.zeros(1, 1, 12, 12, 12))
    with pytest.raises(UserError, match="10 x 12 x 12 cannot be cut into patches of 4 cells"):
        DPOT3d(DPOTSize(8, 4, 1, 2), 1, 1)(torch.zeros(1, 1, 10, 12, 12))


def test_dpot3d_puts_the_cells_of_a_patch_back_where_they_were() -> None:
    """With identities for weights the network returns its input: GELU hardly changes large positive numbers."""
    network = DPOT3d(DPOTSize(64, patch=4, blocks=0, head_width=1), 1, 1)
    with torch.no_grad():
        for layer in (network.embed, network.aggregate, network.hidden):
            layer.weight.copy_(torch.eye(64))
        for parameter in (network.embed.bias, network.aggregate.bias, network.hidden.bias, *network.cell.parameters()):
            parameter.zero_()
        network.out.weight.fill_(1)
    field = 10 + torch.rand(2, 1, 8, 12, 16)
    assert torch.allclose(network(field), field, atol=1e-4)


def test_the_learning_rate_follows_the_time() -> None:
    assert learning_rate(WARM_UP / 2, 1.0) == pytest.approx(0.5)
    assert learning_rate(WARM_UP, 1.0) == pytest.approx(1.0)
    middle = WARM_UP + (1 - WARM_UP) / 2
    assert learning_rate(middle, 2.0) == pytest.approx(2 * (LEAST + (1 - LEAST) / 2))
    assert learning_rate(1.0, 1.0) == pytest.approx(LEAST)
    assert learning_rate(1.7, 1.0) == pytest.approx(LEAST)


def test_a_time_budget_counts_from_when_it_is_made() -> None:
    now = [100.0]
    budget = TimeBudget(8.0, clock=lambda: now[0])
    assert budget.share == 0
    now[0] = 106.0
    assert (budget.spent, budget.share) == (6.0, 0.75)


def test_windows_are_successive_snapshots_of_one_trajectory(tmp_path: Path) -> None:
    records = list_trajectories(write_dataset(tmp_path, snapshots=5), "train")
    windows = Windows(records, history=2)
    assert windows.sizes == (3, 3)
    truth = [torch.from_numpy(read_trajectory(record).velocity_T3XYZ) for record in records]
    batches, found = windows.batches(DomainSampler(windows.sizes, 2, seed=0)), set()
    for _ in range(3):  # an epoch
        batch = next(batches)
        assert batch.shape == (2, 3, 5, 16, 16, 16)
        for velocity in batch[:, :, :3]:
            places = [(n, s) for n, one in enumerate(truth) for s in range(3) if torch.equal(one[s : s + 3], velocity)]
            assert len(places) == 1
            found.add(places[0])
    assert found == {(n, s) for n in range(2) for s in range(3)}


class Doubling(nn.Module):
    """Predict a change that doubles the last of two snapshots, and remember what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, given_BCXYZ: Tensor) -> Tensor:
        self.seen.append(given_BCXYZ)
        return given_BCXYZ[:, 4:8]


def test_a_forecast_feeds_predictions_back_in_units_of_the_data() -> None:
    network = Doubling()
    fields = torch.arange(1.0, 4.0)[:, None, None, None, None].expand(3, 4, 2, 2, 2)
    flow = Flow(fields, torch.ones(1, 2, 2, 2), "any")
    found = of_peer(PeerModel(network, 2, STATS), "central2")(flow, 3)
    assert found.fields_N4XYZ[:, :, 0, 0, 0].tolist() == [[6.0] * 4, [12.0] * 4, [24.0] * 4]
    assert torch.equal(found.conserved_N3XYZ, found.fields_N4XYZ[:, :3])
    first, second = network.seen[:2]
    assert first[0, :, 0, 0, 0].tolist() == [*[1.0] * 3, 0.5, *[1.5] * 3, 0.75, 1.0]
    assert second[0, 4:, 0, 0, 0].tolist() == [*[3.0] * 3, 1.5, 1.0]


@pytest.fixture
def given(tmp_path: Path) -> ForecastConfig:
    """A benchmark on a small dataset of other people."""
    write_dataset(tmp_path / "given", snapshots=6)
    content = tree(tmp_path)
    content["base"]["data"] = {"name": "given", "path": str(tmp_path / "given"), "grid": [16, 16, 16]}
    content["base"]["tokenizer"]["root"] = str(tmp_path / "tokenizers")
    return ForecastConfig.model_validate(content)


def test_a_training_ends_when_its_time_is_over(given: ForecastConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances 0.5 s each time it is read gives 8 s, and with one reading a step 15 steps."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr("shodh_moe.forecast.train_peer.TimeBudget", lambda seconds: TimeBudget(seconds, clock))
    model, found = train_peer(given, Training("dpot", 1e-3, seed=3))
    assert (found["steps"], found["samples"], found["diverged"]) == (15, 30, None)
    assert found["seconds"] >= 8
    again, _ = train_peer(given, Training("dpot", 1e-3, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_loss_that_is_not_finite_ends_the_training(given: ForecastConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shodh_moe.forecast.train_peer._loss",
        lambda model, batch: sum((one * float("nan")).sum() for one in model.parameters()),
    )
    _, found = train_peer(given, Training("dpot", 1e-3, seed=3))
    assert (found["steps"], found["diverged"]) == (1, 1)
    assert json.dumps(found)
