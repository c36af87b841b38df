"""Experts that move between ranks at checkpoints: the training is the same, the ranks share the work, and a run
resumes exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import EXIT_REQUEUE
from shodh_moe.checkpoint import CheckpointReader
from tests.training.launch import launch
from tests.training.synthetic import write_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("worker_pretrain.py")
# The experts of both domains, 0 and 1, are on rank 0 at first.
SETTINGS = (
    "training.precision=float64",
    "training.log_every=1",
    "model.moe.scope=path",
    "model.moe.num_experts=4",
    "model.moe.router.kind=oracle",
    "model.moe.attention=own",
)


def _train(folder: Path, run: Path, *settings: str) -> tuple[list[dict], str]:
    done = launch(2, WORKER, str(folder), str(run), "auto", *SETTINGS, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"], done.stdout


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / "checkpoints" / "6")
    return {name: reader.tensor(name) for name in reader.names()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("placement"))


@pytest.fixture(scope="module")
def fixed(folder) -> list[dict]:
    records, output = _train(folder, folder / "fixed")
    assert "experts have moved" not in output
    assert [record["sample_exchange"]["held_imbalance"] for record in records] == [2.0] * 6
    return records


@pytest.mark.parametrize(
    ("exchange", "zero"), [("sample", 0), ("sample", 2), ("token", 1)], ids=["samples", "samples, ZeRO 2", "tokens"]
)
def test_experts_move_to_where_there_is_less_to_do_and_nothing_else_changes(folder, fixed, exchange, zero):
    run = folder / f"{exchange} {zero}"
    settings = ("parallel.placement=load", f"parallel.exchange={exchange}", f"parallel.zero_stage={zero}")
    records, output = _train(folder, run, *settings)
    assert output.count("step 3: experts have moved") == 1
    assert CheckpointReader(run / "checkpoints" / "3").state["placement"] == [0, 2, 1, 3]
    if exchange == "sample":
        assert [record["sample_exchange"]["held_imbalance"] for record in records] == [2.0] * 3 + [1.0] * 3
    for record, same in zip(records, fixed, strict=True):
        assert record["step"] == same["step"]
        for key in ("loss", "grad_norm", "grad_norm_shared"):
            assert record[key] == pytest.approx(same[key], rel=1e-9)
        for layer, other in zip(record["routing"], same["routing"], strict=True):
            assert layer["expert_grad_norm"] == pytest.approx(other["expert_grad_norm"], rel=1e-9)
            assert layer["load"] == other["load"]
    expected = _tensors(folder / "fixed")
    for name, value in _tensors(run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_resumes_exactly_where_its_experts_were(folder):
    """A signal must not move them: the load since checkpoint 3 goes through checkpoint 4 to the decision at 6."""
    whole, stopped = folder / "whole", folder / "stopped"
    settings = ("parallel.placement=load", "parallel.zero_stage=1", "training.keep_last=9")
    _train(folder, whole, *settings)
    done = launch(2, WORKER.with_name("worker_stops.py"), str(folder), str(stopped), "auto", *SETTINGS, *settings)
    assert done.returncode == EXIT_REQUEUE, done.stdout + done.stderr
    reader = CheckpointReader(stopped / "checkpoints" / "4")
    assert reader.state["placement"] == [0, 2, 1, 3]
    assert reader.rank_state(0)["interval/routing/load"].tolist() == [16.0, 16.0, 0.0, 0.0]
    _, output = _train(folder, stopped, *settings)
    assert "from step 4" in output
    expected = _tensors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in _tensors(stopped).items())
    assert CheckpointReader(stopped / "checkpoints" / "6").state["placement"] == [0, 2, 1, 3]
