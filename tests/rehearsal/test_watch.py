"""Each kind of fault is recorded: in small pieces of code, and in trainings with one fault each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.config import Config
from shodh_moe.rehearsal.findings import Findings, problems

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first rehearsal on a machine compiles the stub
    pytest.mark.skipif(torch.version.cuda is not None, reason="takes the place of a device that a CUDA build has"),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, Any]:
    """The records of `worker_watch`, made in a process of its own: rank 1 of 4."""
    path = tmp_path_factory.mktemp("rehearsal") / "found.json"
    command = [sys.executable, "-m", "tests.rehearsal.worker_watch", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


WAITS = {
    "item": "_local_scalar_dense",
    "tolist": "copy to the CPU",
    "bool": "_local_scalar_dense",
    "cpu": "copy to the CPU",
    "nonzero": "nonzero, whose shape depends on values",
    "bool index": "indices of bool",
    "list index": "copy to the device from memory that is not pinned",
    "bincount": "bincount, whose shape depends on values",
    "tensor": "copy to the device from memory that is not pinned",
    "to": "copy to the device from memory that is not pinned",
    "to, pinned": "copy to the device",
    "repeat_interleave": "repeat_interleave, whose shape depends on values",
    "barrier": "barrier",
}


@pytest.mark.parametrize(("piece", "what"), WAITS.items(), ids=WAITS)
def test_a_wait_is_recorded(recorded, piece, what):
    found = recorded["found"][piece]
    assert what in [wait[2] for wait in found["waits"]], found
    assert not found["error"]


@pytest.mark.parametrize("piece", ["cpu without waiting", "sent", "sent_numbers", "backward", "reduction", "exchange"])
def test_what_does_not_wait_is_not_recorded(recorded, piece):
    assert recorded["found"][piece]["waits"] == []
    assert not recorded["found"][piece]["error"]


def test_numbers_that_the_host_knows_reach_it_again(recorded):
    assert recorded["found"]["count_classes"]["result"] == [1, 2, 0]
    assert recorded["found"]["repeat_interleave"]["result"] == [5]


@pytest.mark.parametrize("piece", ["mixed devices", "reduction on the CPU"])
def test_tensors_on_the_wrong_device_raise(recorded, piece):
    assert recorded["found"][piece]["error"]


def test_a_backward_pass_runs_on_the_fake_device(recorded):
    found = recorded["found"]["backward"]
    assert found["result"] == "torch.bfloat16 torch.float32 cuda [8, 8]"
    assert {(row[2], row[3]) for row in found["products"]} == {("mm", "bfloat16 bfloat16")}


def test_collectives_and_their_bytes_are_recorded(recorded):
    assert recorded["found"]["reduction"]["collectives"] == [["", "world", "all_reduce", 1, 12]]
    assert recorded["found"]["exchange"]["collectives"] == [["", "world", "all_to_all", 1, 32]]


def test_freed_memory_does_not_count(recorded):
    assert recorded["found"]["freed"]["peak"] <= 2 * 4000


SLABS = [
    *("samples", "tokens, a router in each layer", "a path for each token", "two paths for a sample", "windows"),
    "film",
]


def found_in(recorded: dict[str, Any], training: str) -> list[str]:
    """The problems of one of the trainings; memory is not compared at these sizes."""
    found = recorded["found"][training]
    rows = {key: [tuple(row) for row in found[key]] for key in ("waits", "collectives", "products")}
    findings = Findings(1, 4, found["peaks"], **rows, error=found["error"])
    config = Config.model_validate(recorded["configs"][training])
    return [line for line in problems(findings, config) if "GiB" not in line]


def test_a_training_without_a_fault_is_as_planned(recorded):
    assert found_in(recorded, "training: none") == []


@pytest.mark.parametrize("slabs", SLABS)
def test_collectives_among_ranks_with_slabs_are_as_planned(recorded, slabs):
    assert found_in(recorded, f"slabs: {slabs}") == []
    groups = {row[1] for row in recorded["found"][f"slabs: {slabs}"]["collectives"]}
    assert "context parallel" in groups


FAULTS = {
    "a wait": "training/trainer.py make_step waits for the device, 1 times: _local_scalar_dense",
    "a collective": "all_reduce in the group world",
    "mixed devices": "FakeTensorDeviceMismatchError",
    "no autocast": "model/attention.py forward multiplies in float32",
}


@pytest.mark.parametrize(("training", "says"), FAULTS.items(), ids=FAULTS)
def test_a_fault_of_a_training_is_found(recorded, training, says):
    lines = found_in(recorded, f"training: {training}")
    assert any(says in line for line in lines), lines
