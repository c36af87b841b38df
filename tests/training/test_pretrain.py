"""Pretraining on two real ranks: telemetry, checkpoints, and bitwise equal results after a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.config import TrainingConfig
from shodh_moe.training.trainer import learning_rate
from tests.training.launch import launch
from tests.training.synthetic import write_case

WORKER = Path(__file__).with_name("worker_pretrain.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def unbroken(folder) -> Path:
    run = folder / "unbroken"
    run.mkdir()
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def _tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / str(step))
    return {name: reader.tensor(name) for name in reader.names()}


def _check_same_end(run: Path, other: Path) -> None:
    a, b = _tensors(run), _tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    keys = ("step", "loss", "grad_norm", "grad_norm_shared")
    for first, second in zip(_records(run, "train"), _records(other, "train"), strict=True):
        assert [first[key] for key in keys] == [second[key] for key in keys]
        for layer, same in zip(first["routing"], second["routing"], strict=True):
            assert {**layer, "all_to_all": 0} == {**same, "all_to_all": 0}  # which holds timings


def _records(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.distributed
def test_a_crash_after_a_checkpoint_changes_nothing(folder, unbroken):
    run = folder / "crashed"
    shutil.copytree(unbroken, run)
    # The state after a crash in step 5: no checkpoint 6, half a line in the log, a half-written checkpoint.
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "latest").write_text("3\n")
    (run / "checkpoints" / ".writing-6-killed-1").mkdir()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "tr')
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 3" in done.stdout
    assert "kernels: compiled CPU passes, torch reference; AdamW: torch; norms: torch" in done.stdout
    assert not (run / "checkpoints" / ".writing-6-killed-1").exists()
    _check_same_end(run, unbroken)


@pytest.mark.distributed
def test_an_exchange_of_samples_resumes_exactly_and_records_its_shares(folder):
    """The records are written between the checkpoints, so that their sums have to pass through one."""
    settings = ("model.moe.scope=path", "training.log_every=2", "parallel.exchange_capacity=1.0")
    run, crashed = folder / "samples", folder / "samples crashed"

    def train(run: Path) -> list[dict]:
        done = launch(2, WORKER, str(folder), str(run), "auto", *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return _records(run, "train")

    records = train(run)
    shutil.copytree(run, crashed)
    shutil.rmtree(crashed / "checkpoints" / "6")
    resumed = train(crashed)
    assert [record["step"] for record in resumed] == [2, 4, 6]
    timings = dict.fromkeys(("ms", "wait_ms"), 0)
    for record, same in zip(records, resumed, strict=True):
        shares = record["sample_exchange"]
        assert {**shares, **timings} == {**same["sample_exchange"], **timings}
        assert 1 == shares["imbalance"] <= shares["held_imbalance"] <= 2
        assert 0 <= shares["by_tokens"] <= 0.5
        assert shares["bytes"] > 0
        assert 0 < shares["wait_ms"] <= shares["ms"]
    _check_same_end(crashed, run)


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_is_used(folder, unbroken):
    run = folder / "damaged"
    shutil.copytree(unbroken, run)
    path = run / "checkpoints" / "6" / "rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    refusal = f"checkpoint {run / 'checkpoints' / '6'} is refused: rank_00001.safetensors does not match its hash"
    assert done.stdout.count(refusal) == 1, "only one rank checks"
    assert "from step 3" in done.stdout
    _check_same_end(run, unbroken)


@pytest.mark.distributed
def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensors_name(folder, unbroken):
    run = folder / "wider"
    shutil.copytree(unbroken, run)
    done = launch(2, WORKER, str(folder), str(run), "auto", "model.moe.expert_hidden=24")
    assert done.returncode == 2
    assert "model/blocks.0.moe.shared.0.gate_up.weight is [32, 24] as saved and [48, 24] in the model" in done.stderr
    assert done.stderr.count("error") == 1, "the other rank ends silently"


@pytest.mark.distributed
def test_a_named_checkpoint_resumes_at_another_layout(folder, unbroken):
    run = folder / "named"
    run.mkdir()
    start = unbroken / "checkpoints" / "3"
    settings = ("training.optimizer=torch", "parallel.zero_stage=2", "parallel.ep_size=1")
    done = launch(2, WORKER, str(folder), str(run), str(start), *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from step 3 of {start}: 2 ranks, EP 1, ZeRO 2, float32" in done.stdout
    for name, value in _tensors(unbroken).items():
        torch.testing.assert_close(_tensors(run)[name], value, rtol=1e-4, atol=1e-6)
    done = launch(2, WORKER, str(folder), str(run), str(folder / "no such"))
    assert done.returncode == 2
    assert "no such is refused" in done.stderr


@pytest.mark.distributed
def test_a_different_number_of_ranks_resumes_with_a_notice(folder, unbroken):
    run = folder / "alone"
    shutil.copytree(unbroken, run)
    at_3 = str(run / "checkpoints" / "3")
    done = launch(1, WORKER, str(folder), str(run), at_3, "training.checkpoint_every=1", "training.steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made by 2 ranks, now 1: the global batch changes" in done.stdout
    assert "checkpoints/6 is now abandoned-6" in done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_other_precisions_train_with_checkpointing_and_accumulation(folder, precision):
    run = folder / precision
    run.mkdir()
    settings = (f"training.precision={precision}", "training.activation_checkpointing=true", "training.accumulation=2")
    done = launch(2, WORKER, str(folder), str(run), "auto", *settings, "parallel.zero_stage=1", "training.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = _records(run, "train")
    assert 0 < record["loss"] < 10
    assert _tensors(run, 3)["model/embed.weight"].dtype == (torch.float64 if precision == "float64" else torch.float32)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_is_not_finite_halts_or_is_skipped(folder, stage):
    """One latent of one training trajectory contains NaN."""
    broken = write_case(folder / f"broken{stage}", nan_in="porous_media_1")
    zero = f"parallel.zero_stage={stage}"
    halted = launch(2, WORKER, str(broken), str(broken / "halted"), "auto", zero)
    assert halted.returncode == 2
    assert "domain porous_media" in halted.stderr
    assert ": layer 0, " in halted.stderr
    (file,) = (broken / "halted" / "nonfinite").iterdir()
    assert str(file) in halted.stderr
    saved = json.loads(file.read_text())
    bad = [s for rank in saved["ranks"] for micro in rank["micro_batches"] for s in micro["samples"] if not s["finite"]]
    assert {(s["domain"], s["file"]) for s in bad} == {("porous_media", "porous_media_1.hdf5")}
    assert saved["step"] == int(file.stem)

    skipped = launch(2, WORKER, str(broken), str(broken / "skipped"), "auto", zero, "training.on_nonfinite=skip")
    assert skipped.returncode == 0, skipped.stdout + skipped.stderr
    assert "the step is skipped" in skipped.stdout
    last = _records(broken / "skipped", "train")[-1]
    assert last["skipped_steps"] == len(list((broken / "skipped" / "nonfinite").iterdir()))
    tensors = _tensors(broken / "skipped")
    assert all(value.isfinite().all() for value in tensors.values())
    reader = CheckpointReader(broken / "skipped" / "checkpoints" / "6")
    assert reader.state["updates"] == 6 - last["skipped_steps"]


@pytest.mark.distributed
def test_ranks_with_different_configs_end_with_both_values(folder):
    """Rank 1 gets a different batch size, so capacities would differ and the exchange would hang."""
    run = folder / "disagree"
    run.mkdir()
    done = launch(2, WORKER, str(folder), str(run), "auto", "rank1:training.batch_size=8", timeout=60)
    assert done.returncode == 2
    assert "ranks disagree on training.batch_size: 4 on rank 0, 8 on rank 1" in done.stderr


def test_telemetry_reaches_metrics_jsonl_and_tensorboard(unbroken):
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
    expected = {
        "train/loss",
        "train/learning_rate",
        "train/step_ms",
        "valid/latent_mse/open_channel",
        "routing_load/layer_0/open_channel/expert_1",
        "routing_dropped/layer_1/porous_media",
        "routing_entropy/layer_1/open_channel",
    }
    assert expected <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6]
    assert events.Scalars("train/loss")[1].value == pytest.approx(train[1]["loss"], rel=1e-6)


def test_checkpoints_stack_the_experts_of_all_ranks(unbroken):
    experts = {name: value for name, value in _tensors(unbroken).items() if ".experts." in name}
    assert len(experts) == 12  # two layers, two weights, each with two moments
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
