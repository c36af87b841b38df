"""The shipped configs for GPUs at 1, 8 and 64 ranks, rehearsed with fewer layers and a small tokenizer's batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shodh_moe.config.load import load_config
from shodh_moe.rehearsal.findings import problems
from shodh_moe.rehearsal.rehearse import rehearse, table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
UNROLLED = (
    "training.unroll=2 training.unroll_gradient=through training.history_noise=0.1 model.scale_history=true "
    "training.batch_size=12"
)
RUNS = {
    "pretrain_1gpu, 1": ("pretrain_1gpu", 1, 0, "model.depth=4"),
    "one_gpu, 8": ("one_gpu", 8, 3, "model.depth=4 parallel.ep_size=4 parallel.zero_stage=2"),
    "node_8gpu, 8": (*("node_8gpu", 8, 7), "model.depth=4 training.unroll=2 training.history_noise=0.1"),
    "slabs, 8": (*("node_8gpu", 8, 5), f"model.depth=4 parallel.context_size=2 parallel.ep_size=4 {UNROLLED}"),
    "cluster_8x8, 64": ("cluster_8x8", 64, 63, "model.depth=4"),
    "tokens, 64": (
        *("cluster_8x8", 64, 0),
        "model.depth=6 parallel.exchange=token training.activation_checkpointing=true",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.version.cuda is not None, reason="takes the place of a device that a CUDA build has")
@pytest.mark.parametrize(("name", "world", "rank", "changes"), RUNS.values(), ids=RUNS)
def test_a_config_for_gpus_runs_as_planned(name, world, rank, changes):
    config = load_config(CONFIGS / f"{name}.yaml", f"{changes} tokenizer.batch_size={world}".split())
    found = rehearse(config, world, rank)
    assert problems(found, config) == [], table(found, config)
    assert {"build", "step", "record", "validation", "tokenizer step"} <= found.peak.keys()
    assert ("predict" in found.peak) == (rank == 0)
