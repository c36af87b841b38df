from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from shodh_moe.audit.routing import Speeds, bifurcation, heldout_routing, local_speed, local_speeds, unseen
from shodh_moe.audit.windows import all_windows, latent_errors
from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.data import list_trajectories
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory, load_latents
from tests import tiny
from tests.audit.tiny import make_transformer
from tests.training.synthetic import write_latents

DOMAINS = "open_channel", "porous_media"
ORACLE: dict[str, Any] = {"expert_hidden": 8, "router": {"kind": "oracle"}}


def _config(**moe: Any) -> Config:
    model = {"dim": 16, "depth": 2, "heads": 2, "patch": 1, "moe": moe or {"expert_hidden": 8}}
    return tiny.config(model=model, evaluation={"batch_size": 3})


def _speeds(trajectories: list[LatentTrajectory], of_domain: dict[str, torch.Tensor]) -> Speeds:
    return {(one.source, one.sample): of_domain[one.domain].expand(one.snapshots, 2, 2, 2) for one in trajectories}


@pytest.fixture(scope="module")
def test_split(tmp_path_factory: pytest.TempPathFactory) -> list[LatentTrajectory]:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return load_latents(folder, "test")


def test_oracle_routing_knows_only_the_domain(test_split: list[LatentTrajectory]) -> None:
    config = _config(**ORACLE)
    alike = dict.fromkeys(DOMAINS, torch.arange(8.0).view(2, 2, 2))
    found = heldout_routing(make_transformer(config), test_split, _speeds(test_split, alike), config)
    assert found is not None
    assert found["bifurcated"]
    for layer in found["layers"]:
        assert layer["load"] == {"open_channel": [1, 0], "porous_media": [0, 1]}
        information = layer["mutual_information"]
        assert information["domain"] == pytest.approx(math.log(2))
        assert information["speed"] == pytest.approx(0, abs=1e-12)
        assert information["domain_given_speed"] == pytest.approx(math.log(2))


def test_a_speed_that_identifies_the_domain_leaves_no_further_information(test_split: list[LatentTrajectory]) -> None:
    config = _config(**ORACLE)
    apart = {"open_channel": torch.arange(8.0).view(2, 2, 2), "porous_media": torch.arange(8.0, 16).view(2, 2, 2)}
    found = heldout_routing(make_transformer(config), test_split, _speeds(test_split, apart), config)
    assert found is not None
    information = found["layers"][0]["mutual_information"]
    assert information["speed"] == pytest.approx(math.log(2))
    assert information["domain_given_speed"] == pytest.approx(0, abs=1e-12)


def test_solid_tokens_are_a_category_of_their_own(test_split: list[LatentTrajectory]) -> None:
    """One domain is entirely solid: its tokens do not shift the quartiles, and their category identifies the domain."""
    config = _config(**ORACLE)
    mixed = [
        replace(one, solid_fraction_xyz=torch.full((2, 2, 2), float(one.domain == DOMAINS[1]))) for one in test_split
    ]
    speeds = _speeds(mixed, dict.fromkeys(DOMAINS, torch.arange(8.0).view(2, 2, 2)))
    found = heldout_routing(make_transformer(config), mixed, speeds, config)
    assert found is not None
    information = found["layers"][1]["mutual_information"]
    for name in ("solid_fraction", "speed"):
        assert information[name] == pytest.approx(math.log(2))
        assert information[f"domain_given_{name}"] == 0


def test_the_speed_is_taken_from_the_newest_snapshot(test_split: list[LatentTrajectory]) -> None:
    """Speeds identify the domain only before the first window's newest snapshot, and in the last target."""
    config = _config(**ORACLE)
    speeds = _speeds(test_split, dict.fromkeys(DOMAINS, torch.arange(8.0).view(2, 2, 2)))
    speeds = {key: speed.clone() for key, speed in speeds.items()}
    for (source, _), speed in speeds.items():
        speed[0] = speed[-1] = 100.0 * source.startswith("porous")
    found = heldout_routing(make_transformer(config), test_split, speeds, config)
    assert found is not None
    assert found["layers"][0]["mutual_information"]["speed"] == pytest.approx(0, abs=1e-12)


def test_every_token_of_every_window_is_counted(test_split: list[LatentTrajectory]) -> None:
    """Compare with the router's choices counted window by window."""
    config = _config()
    transformer = make_transformer(config)
    found = heldout_routing(transformer, test_split, None, config)
    assert found is not None
    for one in test_split:
        z = one.read()
        counts = torch.zeros(2)
        for start in range(5):
            routing = transformer(z[None, start : start + 2], one.geometry_Cxyz[None]).routing[1]
            counts += torch.bincount(routing.expert_N, minlength=2)
        assert found["layers"][1]["load"][one.domain] == pytest.approx((counts / 40).tolist())
    information = found["layers"][1]["mutual_information"]
    assert information["speed"] is None
    assert information["domain_given_speed"] is None
    assert information["domain_given_solid_fraction"] is not None


def test_errors_are_means_over_windows(test_split: list[LatentTrajectory]) -> None:
    config = _config()
    transformer = make_transformer(config)
    found = unseen(transformer, test_split, config)
    assert found["routing"]["layers"][0]["mutual_information"].keys() == {
        "domain",
        "solid_fraction",
        "speed",
        "domain_given_solid_fraction",
        "domain_given_speed",
    }
    for one in test_split:
        z = one.read()
        histories = torch.stack([z[start : start + 2] for start in range(5)])
        with torch.no_grad():
            predicted = transformer(histories, one.geometry_Cxyz.expand(5, -1, -1, -1, -1)).latent_BCxyz
        errors = found["errors"][one.domain]
        assert errors["latent_mse"] == pytest.approx(float((predicted - z[2:]).square().mean()), rel=1e-5)
        assert errors["latent_mse_persistence"] == pytest.approx(float((z[1:-1] - z[2:]).square().mean()), rel=1e-5)


def test_a_dense_model_has_errors_but_no_routing(test_split: list[LatentTrajectory]) -> None:
    config = _config(num_experts=0, expert_hidden=8, shared_experts=2)
    found = unseen(make_transformer(config), test_split, config)
    assert found["routing"] is None
    assert found["errors"].keys() == set(DOMAINS)


def test_a_subset_is_spread_evenly_and_tokens_are_never_dropped(test_split: list[LatentTrajectory]) -> None:
    samples = LatentSamples(test_split, 2)
    assert all_windows(samples, 2) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert all_windows(samples, 99) == all_windows(samples)
    config = _config()
    transformer = make_transformer(config)
    assert latent_errors(transformer, samples, 3, [(1, 0)]).keys() == {"porous_media"}
    with pytest.raises(ValueError, match="training mode"):
        latent_errors(transformer.train(), samples, 3)


def test_the_local_speed_is_a_mean_over_cells(tmp_path: Path, test_split: list[LatentTrajectory]) -> None:
    dataset = tiny.write_dataset(tmp_path, snapshots=9)
    record = list_trajectories(dataset, "test")[0]
    speed = local_speed(record, 1)
    assert speed.shape == (9, 2, 2, 2)
    with h5py.File(record.path) as file:
        cells = torch.from_numpy(file["t1_fields/velocity"][0, 8, 8:, :8, 8:])
    assert speed[8, 1, 0, 1] == pytest.approx(float(cells.square().sum(-1).sqrt().mean()), rel=1e-5)
    config = _config()
    named = replace(test_split[0], source=record.path.name, sample=record.sample)
    found = local_speeds(config, dataset, "test", [named])
    assert torch.equal(found[record.path.name, 0], speed)
    with pytest.raises(UserError, match=r"open_channel_0\.hdf5 has latents but is not in the test split"):
        local_speeds(config, dataset, "test", test_split)


def _record(step: int, a: float, b: float) -> dict[str, Any]:
    layers = [{"layer": n, "load": {"a": [1 - share, share], "b": [0.0, 1.0]}} for n, share in enumerate((a, b))]
    return {"kind": "train", "step": step, "routing": layers}


def test_bifurcation_counts_from_the_last_flip() -> None:
    records = [_record(10, 0, 0), _record(20, 0, 0.5), {"kind": "train", "step": 25}, _record(30, 0.01, 0)]
    records.append(_record(40, 0, 0))
    found = bifurcation(records)
    assert found is not None
    assert found["step"] == 30
    assert [record["step"] for record in found["loads"]] == [10, 20, 30, 40]
    assert found["loads"][1]["load"][1] == {"a": [0.5, 0.5], "b": [0.0, 1.0]}


def test_a_run_that_flips_back_at_the_end_did_not_bifurcate() -> None:
    found = bifurcation([_record(10, 0, 0), _record(20, 0, 0), _record(30, 0.02, 0)])
    assert found is not None
    assert found["step"] is None
    looser = bifurcation([_record(10, 0, 0), _record(20, 0, 0), _record(30, 0.02, 0)], threshold=0.9)
    assert looser is not None
    assert looser["step"] == 10


def test_many_records_are_thinned_but_the_last_is_kept() -> None:
    found = bifurcation(_record(step, 0, 0) for step in range(1, 252))
    assert found is not None
    steps = [record["step"] for record in found["loads"]]
    assert steps[-1] == 251
    assert len(steps) == 84
    assert {b - a for a, b in pairwise(steps)} == {3}
    assert found["step"] == 1


def test_a_dense_run_has_no_bifurcation() -> None:
    assert bifurcation([{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "routing": []}]) is None
