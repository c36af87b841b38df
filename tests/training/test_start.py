"""A run that starts from the weights of another: which weights, what is new, what it records, what it refuses."""

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
# Too small for float32: steps are made, but no weight changes.
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


def test_begins_with_exactly_the_weights_and_a_fresh_optimizer(folder, origin):
    """At another EP size and ZeRO stage."""
    layout = ("parallel.ep_size=1", "parallel.zero_stage=2")
    run = _train(folder, "still", f"start={origin}", *layout, *STILL, *ONE_STEP)
    newest, begun = origin / "checkpoints" / "2", run / "checkpoints" / "1"
    assert f"with the weights of {newest}: 2 ranks, EP 1, ZeRO 2" in (run / "stdout").read_text()
    _check_same(_tensors(begun, "model/"), _tensors(newest, "model/"))

    before, state = CheckpointReader(newest).state, CheckpointReader(begun).state
    assert (before["updates"], state["updates"], state["step"]) == (2, 1, 1)
    assert state["start"] == {"path": str(newest), "step": 2, "sha256": before["sha256"]}
    # From zero, one step makes the moments (1 - beta1) g and (1 - beta2) g^2; an older moment would show.
    first, second = TrainingConfig().betas
    means, squares = _tensors(begun, "exp_avg/"), _tensors(begun, "exp_avg_sq/")
    assert means.keys() == {name.replace("model/", "exp_avg/") for name in _tensors(begun, "model/")}
    for name, mean in means.items():
        square = (1 - second) * (mean / (1 - first)) ** 2
        torch.testing.assert_close(squares[name.replace("/", "_sq/", 1)], square, rtol=1e-4, atol=1e-20)


def test_begins_with_a_merged_checkpoint(folder, origin):
    """A merged checkpoint has no moments. This one was made by two ranks; here one rank holds all experts."""
    words = folder / "merge.yaml"
    models = "".join(f"  - model: {origin / 'checkpoints' / step}\n" for step in ("1", "2"))
    words.write_text(f"merge_method: linear\nmodels:\n{models}parameters: {{weight: 0.5}}\n")
    merge(words, folder / "merged")
    run = _train(folder, "of_merged", f"start={folder / 'merged'}", *STILL, *ONE_STEP, ranks=1)
    _check_same(_tensors(run / "checkpoints" / "1", "model/"), _tensors(folder / "merged", "model/"))


def test_goes_on_bit_for_bit_and_remembers_its_start(folder, origin):
    away = folder / "away"
    shutil.copytree(origin, away)
    settings = (f"start={away}", "training.steps=2", "training.checkpoint_every=1", "training.log_every=1")
    whole = _train(folder, "whole", *settings)
    first = CheckpointReader(whole / "checkpoints" / "1").state["start"]
    assert first["path"] == str(away / "checkpoints" / "2")

    broken = folder / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "2")
    (broken / "checkpoints" / "latest").write_text("1\n")
    shutil.rmtree(away)  # is not needed any more
    _train(folder, "broken", *settings)
    output = (broken / "stdout").read_text()
    assert f"from step 1 of {broken / 'checkpoints' / '1'}" in output
    assert "with the weights of" not in output
    _check_same(_tensors(broken / "checkpoints" / "2"), _tensors(whole / "checkpoints" / "2"))
    assert _losses(broken) == _losses(whole)
    assert CheckpointReader(broken / "checkpoints" / "2").state["start"] == first


@pytest.mark.parametrize("what", ["missing", "another network", "another meaning", "damaged"])
def test_refuses_in_one_line_of_rank_0(folder, origin, what):
    start, settings, says = folder / "nowhere", (), "it does not exist"
    if what == "another network":
        start, settings = origin, ("model.moe.expert_hidden=24",)
        says = "model/blocks.0.moe.shared.0.gate_up.weight is [32, 24] as saved and [48, 24] in the model"
    if what == "another meaning":  # of the same shapes
        start, settings = origin, ("model.moe.router.min_temperature=0.02",)
        says = "it is of another model, which differs in model.moe.router.min_temperature"
    if what == "damaged":
        start = folder / "hurt"
        shutil.copytree(origin / "checkpoints" / "2", start)
        path = start / "rank_00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        says = "rank_00001.safetensors does not match its hash"
    run = folder / f"refused {what}"
    done = launch(2, WORKER, str(folder), str(run), "auto", f"start={start}", *settings)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: cannot start from {start}")
    assert says in line
    assert line.endswith("; start: give a run folder or a checkpoint of the same network")
    assert not (run / "checkpoints").exists() or not list((run / "checkpoints").glob("[0-9]*"))
