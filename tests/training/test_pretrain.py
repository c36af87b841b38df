"""Pretraining on two real ranks: telemetry, checkpoints, and going on after a crash bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh_moe.config import TrainingConfig
from shodh_moe.training.pretrain import learning_rate
from tests.training.launch import launch
from tests.training.synthetic import CONFIG, write_latents

WORKER = Path(__file__).with_name("worker_pretrain.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "config.yaml").write_text(CONFIG)
    write_latents(folder / "latents")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder) -> Path:
    run = folder / "unbroken"
    run.mkdir()
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def _records(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.distributed
def test_a_crash_after_a_checkpoint_changes_nothing(folder, unbroken):
    run = folder / "crashed"
    shutil.copytree(unbroken, run)
    # As after a crash during step 5: no checkpoint 6, half a line in the log, a half-written checkpoint.
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "latest").write_text("3\n")
    (run / "checkpoints" / ".writing-6").mkdir()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "tr')
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 3" in done.stdout
    assert "kernels: compiled CPU passes, torch reference" in done.stdout
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(r / "checkpoints" / "6" / file) for r in (unbroken, run))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file
    keys = ("step", "loss", "grad_norm", "routing")
    assert [[r[k] for k in keys] for r in _records(run, "train")] == [
        [r[k] for k in keys] for r in _records(unbroken, "train")
    ]


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(folder, unbroken):
    run = folder / "damaged"
    shutil.copytree(unbroken, run)
    path = run / "checkpoints" / "6" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"checkpoint {run / 'checkpoints' / '6'} is refused: model.safetensors does not match its hash" in done.stdout
    )
    assert "from step 3" in done.stdout


def test_telemetry_in_both_places(unbroken):
    train, valid = _records(unbroken, "train"), _records(unbroken, "valid")
    assert [r["step"] for r in train] == [r["step"] for r in valid] == [3, 6]
    for record in train:
        assert {"loss", "prediction_loss", "balance_loss", "z_loss", "learning_rate", "step_ms"} <= record.keys()
        assert len(record["routing"]) == 2
        for layer in record["routing"]:
            for domain in ("open_channel", "porous_media"):
                assert sum(layer["load"][domain]) == pytest.approx(1)
                assert 0 <= layer["dropped_fraction"][domain] <= 1
                assert 0 <= layer["entropy"][domain] <= 0.6932
    events = EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {
        "train/loss",
        "train/learning_rate",
        "train/step_ms",
        "valid/latent_mse/open_channel",
        "routing_load/layer_0/open_channel/expert_1",
        "routing_dropped/layer_1/porous_media",
        "routing_entropy/layer_1/open_channel",
    }
    assert wanted <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6]
    assert events.Scalars("train/loss")[1].value == pytest.approx(train[1]["loss"], rel=1e-6)


def test_checkpoint_stacks_all_experts_of_all_ranks(unbroken):
    weights = load_file(unbroken / "checkpoints" / "6" / "model.safetensors")
    experts = {name: value for name, value in weights.items() if ".experts." in name}
    assert len(experts) == 4
    for value in experts.values():
        assert value.shape[0] == 2
        assert not torch.equal(value[0], value[1])


def test_learning_rate_schedule():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(55, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)
