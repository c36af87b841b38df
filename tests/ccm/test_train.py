"""Training experts with the common trainer on two real ranks, through the command as a user does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from shodh_moe.ccm import data
from shodh_moe.ccm.expert import load_expert
from shodh_moe.ccm.windows import Scale, Windows
from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.cli import main as shodh
from shodh_moe.operators import nrmse
from tests.ccm.tiny import config, tree
from tests.training.launch import launch

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train_expert.py"


def _write(folder: Path, **changes) -> Path:
    path = folder / f"{changes.get('name', 'anchor')}.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **changes)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data and a trained anchor."""
    folder = tmp_path_factory.mktemp("expert")
    assert shodh(["expert", "train", "--config", str(_write(folder))]) == 0
    return folder


def _weights(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / str(step))
    return {name: reader.tensor(name) for name in reader.names()}


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_is_like_any_other(folder):
    run = folder / "runs" / "anchor"
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= {
        path.name for path in run.iterdir()
    }
    train = [record for record in _records(run) if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3, 4]
    assert [record["rollout"] for record in train] == [1, 1, 2, 2]


def test_validation_is_the_error_of_the_expert_as_loaded(folder):
    run = folder / "runs" / "anchor"
    stored = next(record for record in _records(run) if record["kind"] == "valid")["rollout_nrmse"]
    expert, family = load_expert(run), config(folder).family
    for regime in data.read_split(family.family(), family.folder(), "validation"):
        predicted = expert.predict(regime.fields[:, :1], 5, regime.coordinate)
        expected = float(nrmse(predicted, regime.fields[:, 1:]).mean())
        assert stored[f"{regime.coordinate:+.3f}"] == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(folder):
    run = folder / "runs" / "anchor"
    other = folder / "runs" / "cut"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / "4")
    done = launch(2, SCRIPT, "--config", str(_write(folder, name="cut")))
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = _weights(run), _weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", [0, 2])
def test_an_endpoint_expert_starts_from_its_anchor(folder, stage):
    """At a learning rate near zero it keeps the anchor's weights at any ZeRO stage; it also keeps the units."""
    anchor = folder / "runs" / "anchor"
    name = f"low-{stage}"
    training = {**tree(folder)["training"], "batch_size": 2, "learning_rate": 1e-12, "min_learning_rate": 0.0}
    changes = {"splits": ["endpoint_low"], "training": training, "parallel": {"processes": 2, "zero_stage": stage}}
    path = _write(folder, name=name, start=str(anchor), **changes)
    done = launch(2, SCRIPT, "--config", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    state = CheckpointReader(folder / "runs" / name / "checkpoints" / "4").state
    assert state["start"]["path"] == str(anchor / "checkpoints" / "4")
    weights, before = _weights(folder / "runs" / name), _weights(anchor)
    for key, value in weights.items():
        if key.startswith("model/"):
            assert torch.allclose(value, before[key], atol=1e-9), key
        elif not key.endswith("out.bias"):
            assert not torch.equal(value, before[key]), key
    assert load_expert(folder / "runs" / name).scale == load_expert(anchor).scale


def test_a_coordinate_in_two_splits_is_one_domain(folder):
    family = config(folder).family
    regimes = [
        regime
        for split in ("support", "endpoint_low")
        for regime in data.read_split(family.family(), family.folder(), split)
    ]
    windows = Windows(regimes, Scale.of(regimes), frames=3)
    assert windows.domains == ["s=-1.000", "s=-0.500", "s=+0.000", "s=+0.500", "s=+1.000"]
    assert windows.sizes == (6 * 4, 3 * 4, 3 * 4, 3 * 4, 3 * 4)
    frames, coordinate, domain = windows.batch([(0, 3 * 4), (4, 1)])
    expected = Scale.of(regimes).normalise(regimes[5].fields[0, :3])  # the first trajectory of endpoint_low
    assert torch.equal(frames[0], expected)
    assert coordinate.tolist() == [-1.0, 1.0]
    assert domain.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": "nothing"}, "nothing is neither a run folder nor a checkpoint"),
        ({"network": {"size": "huge"}}, "fno has no size 'huge': choose from tiny, small, medium, large"),
        ({"splits": ["suport"]}, "splits.0"),
        ({"splits": []}, "splits [] must be one or more different splits"),
        ({"rollout": [9]}, "need 10 snapshots, but family.snapshots is 6"),
        ({"family": {"name": "burgers"}}, "no built-in family 'burgers': choose from"),
        ({"training": {"batch_size": 4}}, "training.batch_size 4 is not divisible by the 5 domains"),
        ({"grid": 3}, "unknown key 'grid'; the nearest valid key is 'family.grid'"),
    ],
)
def test_invalid_settings_are_named(tmp_path, capfd, changes, words):
    path = _write(tmp_path, **{"name": "wrong", **changes})
    assert shodh(["expert", "train", "--config", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert [one.name for one in tmp_path.iterdir()] == ["wrong.yaml"]


def test_an_anchor_of_another_network_is_refused(folder, capfd):
    path = _write(folder, name="other", start=str(folder / "runs" / "anchor"), network={"coordinates": "waves"})
    assert shodh(["expert", "train", "--config", str(path)]) == 2
    assert "has a different network from this config" in capfd.readouterr().err


def test_the_shipped_configs_can_be_read():
    from shodh_moe.ccm.bench.config import BenchConfig
    from shodh_moe.ccm.bench3d.config import Bench3dConfig
    from shodh_moe.ccm.config import ExpertConfig
    from shodh_moe.config.load import load_config_of

    paths = sorted((ROOT / "configs" / "ccm").glob("*.yaml"))
    assert paths
    for path in paths:
        kinds = {"reaction_diffusion": ExpertConfig, "latent": Bench3dConfig}
        load_config_of(kinds.get(path.stem, BenchConfig), path)
