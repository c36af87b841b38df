"""Training the control models of the mixture of experts on real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shodh_moe.checkpoint import CheckpointReader
from tests.training.launch import launch
from tests.training.synthetic import CONFIG, write_case

WORKER = Path(__file__).with_name("worker_pretrain.py")


def _run(folder: Path, old: str, new: str, extra_config: str = "") -> Path:
    write_case(folder)
    assert old in CONFIG
    (folder / "config.yaml").write_text(CONFIG.replace(old, new) + extra_config)
    run = folder / "run"
    run.mkdir()
    done = launch(2, WORKER, str(folder), str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.mark.distributed
def test_a_frozen_router_does_not_change_under_zero(tmp_path):
    capacity_setting = "capacity_factor: 1.0"
    run = _run(
        tmp_path, capacity_setting, f"{capacity_setting}, router: {{frozen: true}}", "parallel: {zero_stage: 2}\n"
    )
    first, last = (CheckpointReader(run / "checkpoints" / step) for step in ("3", "6"))
    for name in (name for name in first.names() if name.startswith("model/")):
        same = torch.equal(first.tensor(name), last.tensor(name))
        assert same == (".router." in name), name


@pytest.mark.distributed
def test_dense_blocks_train_on_a_single_domain(tmp_path):
    run = _run(
        tmp_path, "expert_hidden: 16,", "expert_hidden: 16, num_experts: 0,", "data: {weights: {open_channel: 0}}\n"
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["step"] == 6
    assert train[-1]["balance_loss"] == 0
    assert all("routing" not in record for record in train)
    assert all(list(record["latent_mse"]) == ["porous_media"] for record in records if record["kind"] == "valid")
