"""Gradient accumulation: several micro-batches train like one batch of all their samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launch import launch
from tests.training.synthetic import write_case

pytestmark = pytest.mark.distributed


def test_two_micro_batches_train_like_one_of_twice_the_size_at_every_zero_stage(tmp_path):
    """The balance loss is off since it is no mean over samples, and routing is dropless since capacity depends on the
    batch.
    """
    write_case(tmp_path)
    worker = Path(__file__).with_name("worker_accumulation.py")
    plain = ("model.moe.dropless=true", "model.moe.router.balance_weight=0.0", "model.moe.router.z_weight=0.0")

    def train(name: str, batch: int, accumulation: int, stage: int) -> dict[str, torch.Tensor]:
        sizes = (f"training.batch_size={batch}", f"training.accumulation={accumulation}")
        done = launch(1, worker, str(tmp_path), name, *plain, *sizes, f"parallel.zero_stage={stage}")
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(tmp_path / f"{name}.safetensors")

    whole = train("whole", 8, 1, 0)
    assert whole["norms"].shape == (3,)
    for stage in (0, 1, 2):
        parts = train(f"parts{stage}", 4, 2, stage)
        torch.testing.assert_close(parts["norms"], whole["norms"], rtol=1e-5, atol=0)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
