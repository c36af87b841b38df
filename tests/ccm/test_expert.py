"""An expert is restored from its checkpoint: weights, units, predictions in physical units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.expert import load_expert, require_same_dataset, require_same_network
from shodh_moe.ccm.windows import Scale
from tests.ccm.synthetic import CHANNELS, SCALE, expert_config, initial, make_expert, save_expert

NETWORKS: dict[str, dict[str, Any]] = {
    "fno": {"padding": 0.2},
    "waves": {"coordinates": "waves", "history": 2},
    "dpot": {"kind": "dpot", "size": "tiny", "coordinates": "cells"},
    "conditioned": {"conditioned": True},
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_checkpoint_restores_the_expert(tmp_path: Path, network: dict[str, Any]) -> None:
    expert = make_expert(expert_config(network=network, family={"grid": 24}), 1)
    path = tmp_path / "run" / "checkpoints" / "7"
    save_expert(path, expert.config, expert.network, expert.scale, CHANNELS)
    frames = torch.cat([initial(0, grid=24), initial(1, grid=24)], dim=1)
    expected = expert.predict(frames, 3, 0.5)
    assert expected.shape == (2, 3, 2, 24, 24)
    for place in (path, tmp_path / "run"):
        loaded = load_expert(place)
        assert loaded.scale == expert.scale
        assert torch.equal(loaded.predict(frames, 3, 0.5), expected)


def test_a_prediction_is_the_networks_in_its_own_units() -> None:
    """Compare with one step of the network on (field - mean) / std, scaled back by hand."""
    expert = make_expert(expert_config(), 1)
    frames = initial(0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (SCALE.mean, SCALE.std))
    with torch.no_grad():
        expected = expert.network((frames - mean) / std) * std + mean
    assert torch.allclose(expert.predict(frames, 1, 0.0)[:, 0], expected, atol=1e-6)


def test_units_are_computed_over_all_values() -> None:
    from tests.ccm.synthetic import regime

    fields = torch.randn(3, 4, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    parts = [regime(fields[:1], -1.0), regime(fields[1:], 1.0)]
    scale = Scale.of(parts)
    assert scale.mean == pytest.approx(fields.mean((0, 1, 3, 4)).tolist(), rel=1e-5)
    assert scale.std == pytest.approx(fields.std((0, 1, 3, 4), correction=0).tolist(), rel=1e-5)
    assert torch.allclose(scale.restore(scale.normalise(fields)), fields, atol=1e-5)
    assert Scale.of([regime(torch.ones(1, 2, 2, 3, 3), 0.0)]).std == (1.0, 1.0)


def test_folders_that_are_not_experts_are_refused(tmp_path: Path) -> None:
    expert = make_expert(expert_config(), 1)
    path = tmp_path / "checkpoints" / "1"
    save_expert(path, expert.config, expert.network, expert.scale, CHANNELS)
    with pytest.raises(UserError, match="is neither a run folder nor a checkpoint"):
        load_expert(tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_expert(tmp_path / "empty")
    other = make_expert(expert_config(network={"coordinates": "cells"}), 1)
    with pytest.raises(UserError, match="have different networks"):
        require_same_network([expert, other])
    with pytest.raises(UserError, match="have different units"):
        require_same_network([expert, make_expert(expert_config(), 2, scale=Scale((0.0, 0.0), (1.0, 1.0)))])
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"refused: rank_00000\.safetensors does not match its hash"):
        load_expert(path)


def test_a_checkpoint_of_another_kind_is_not_an_expert(tmp_path: Path) -> None:
    from shodh_moe.checkpoint.state import seal

    expert = make_expert(expert_config(), 1)
    path = tmp_path / "1"
    save_expert(path, expert.config, expert.network, expert.scale, CHANNELS)
    state = json.loads((path / "state.json").read_text())
    del state["expert"], state["sha256"]
    (path / "state.json").write_text(seal(state))
    with pytest.raises(UserError, match="not a checkpoint of an expert"):
        load_expert(path)


def test_an_expert_of_data_that_would_now_differ_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the solvers changes the files of a family, but not the name of their folder."""
    config = expert_config(tmp_path / "data").model_copy(update={"runs": str(tmp_path)})
    expert = make_expert(config, 1)
    save_expert(tmp_path / config.name / "checkpoints" / "7", config, expert.network, expert.scale, CHANNELS)
    require_same_dataset(config)
    monkeypatch.setattr("shodh_moe.ccm.data.PLANAR_VERSION", 99)
    monkeypatch.setattr("shodh_moe.ccm.expert.PLANAR_VERSION", 99)
    with pytest.raises(UserError, match=r"the version of the code that generates data \(1 then, 99 now\), the data \("):
        require_same_dataset(config)
