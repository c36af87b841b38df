"""A run that starts from another run's weights: what it loads, resets, records and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.config import TrainingConfig
from shodh_moe.merging import merge
from tests.training.launch import launch
from tests.training.synthetic import write_case

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("worker_pretrain.py")
# A rate too small for float32: steps are made, but no weight changes.
STILL = ("training.learning_rate=1e-300", "training.min_learning_rate=0", "training.warmup_steps=0")
ONE_STEP = ("training.steps=1", "training.log_every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def origin(folder) -> Path:
    """A run of two ranks, EP 2, ZeRO 0, with the checkpoints of two steps."""
    return _train(folder, "origin", "training.steps=2", "training.checkpoint_every=1")


def _train(folder: Path, name: str, *settings: str, ranks: int = 2) -> Path:
    done = launch(ranks, WORKER, str(folder), str(folder / name), "auto", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / name / "stdout").write_text(done.stdout)
    return folder / name


def _tensors(checkpoint: Path, kind: str = "") -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {name: reader.tensor(name) for name in reader.names() if name.startswith(kind)}


def _check_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_run_starts_with_exactly_the_weights_and_a_fresh_optimizer(folder, origin):
    """At another EP size and ZeRO stage."""
    layout = ("parallel.ep_size=1", "parallel.zero_stage=2")
    run = _train(folder, "still", f"start={origin}", *layout, *STILL, *ONE_STEP)
    newest, started = origin / "checkpoints" / "2", run / "checkpoints" / "1"
    assert f"with the weights of {newest}: 2 ranks, EP 1, ZeRO 2" in (run / "stdout").read_text()
    _check_same(_tensors(started, "model/"), _tensors(newest, "model/"))

    before, state = CheckpointReader(newest).state, CheckpointReader(started).state
    assert (before["updates"], state["updates"], state["step"]) == (2, 1, 1)
    assert state["start"] == {"path": str(newest), "step": 2, "sha256": before["sha256"]}
    # From zero moments, one step gives (1 - beta1) g and (1 - beta2) g^2; leftover moments would break this.
    first, second = TrainingConfig().betas
    means, squares = _tensors(started, "exp_avg/"), _tensors(started, "exp_avg_sq/")
    assert means.keys() == {name.replace("model/", "exp_avg/") for name in _tensors(started, "model/")}
    for name, mean in means.items():
        square = (1 - second) * (mean / (1 - first)) ** 2
        torch.testing.assert_close(squares[name.replace("/", "_sq/", 1)], square, rtol=1e-4, atol=1e-20)


def test_a_run_starts_from_a_merged_checkpoint(folder, origin):
    """A merged checkpoint has no moments. This one was made by two ranks; here one rank holds all experts."""
    config_path = folder / "merge.yaml"
    models = "".join(f"  - model: {origin / 'checkpoints' / step}\n" for step in ("1", "2"))
    config_path.write_text(f"merge_method: linear\nmodels:\n{models}parameters: {{weight: 0.5}}\n")
    merge(config_path, folder / "merged")
    run = _train(folder, "of_merged", f"start={folder / 'merged'}", *STILL, *ONE_STEP, ranks=1)
    _check_same(_tensors(run / "checkpoints" / "1", "model/"), _tensors(folder / "merged", "model/"))


def test_a_resumed_run_is_bit_identical_and_remembers_its_start(folder, origin):
    moved = folder / "away"
    shutil.copytree(origin, moved)
    settings = (f"start={moved}", "training.steps=2", "training.checkpoint_every=1", "training.log_every=1")
    whole = _train(folder, "whole", *settings)
    first = CheckpointReader(whole / "checkpoints" / "1").state["start"]
    assert first["path"] == str(moved / "checkpoints" / "2")

    broken = folder / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "2")
    (broken / "checkpoints" / "latest").write_text("1\n")
    shutil.rmtree(moved)  # resuming does not need it
    _train(folder, "broken", *settings)
    output = (broken / "stdout").read_text()
    assert f"from step 1 of {broken / 'checkpoints' / '1'}" in output
    assert "with the weights of" not in output
    _check_same(_tensors(broken / "checkpoints" / "2"), _tensors(whole / "checkpoints" / "2"))
    assert _losses(broken) == _losses(whole)
    assert CheckpointReader(broken / "checkpoints" / "2").state["start"] == first


@pytest.mark.parametrize("case", ["missing", "another network", "another meaning", "damaged"])
def test_a_refused_start_is_one_line_from_rank_0(folder, origin, case):
    start, settings, message = folder / "nowhere", (), "it does not exist"
    if case == "another network":
        start, settings = origin, ("model.moe.expert_hidden=24",)
        message = "model/blocks.0.moe.shared.0.gate_up.weight is [32, 24] as saved and [48, 24] in the model"
    if case == "another meaning":  # of the same shapes
        start, settings = origin, ("model.moe.router.min_temperature=0.02",)
        message = "it is of another model, which differs in model.moe.router.min_temperature"
    if case == "damaged":
        start = folder / "hurt"
        shutil.copytree(origin / "checkpoints" / "2", start)
        path = start / "rank_00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        message = "rank_00001.safetensors does not match its hash"
    run = folder / f"refused {case}"
    done = launch(2, WORKER, str(folder), str(run), "auto", f"start={start}", *settings)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: cannot start from {start}")
    assert message in line
    assert line.endswith("; start: give a run folder or a checkpoint of the same network")
    assert not (run / "checkpoints").exists() or not list((run / "checkpoints").glob("[0-9]*"))
