"""The planned collectives of a step, against numbers by hand. tests/rehearsal holds them against a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.runs.plan import count_parameters
from shodh_moe.runs.traffic import Traffic, step_traffic, traffic_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _config(moe: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **training: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"grid": [16, 16, 16]},
            "tokenizer": {"latent_channels": 8},
            "model": {"dim": 32, "depth": 3, "heads": 2, "moe": {"num_experts": 4, "expert_hidden": 32, **(moe or {})}},
            "training": {"batch_size": 4, **training},
            "parallel": parallel or {},
        }
    )


def _rows(config: Config, world: int, why: str) -> list[Traffic]:
    return [row for row in step_traffic(config, world) if row.why == why]


def test_an_exchange_of_samples_sends_latents_and_twelve_numbers():
    config = load_config(CONFIGS / "node_8gpu.yaml")
    (row,) = _rows(config, 8, "samples")
    # Two latents of history, geometry and target; domain, stride, expert and six faces in int64; norm, weight and error
    # in float32.
    sample = 4 * 128 * 16**3 * 4 + 9 * 8 + 3 * 4
    assert (row.kind, row.group, row.ranks, row.count) == ("all_to_all", "expert parallel", 8, 3)
    assert row.sent == 8 * sample + 8 * 8 * 8  # the counts of all pairs of ranks


def test_an_exchange_of_tokens_sends_every_layers_rows_four_times():
    config = _config({"dropless": False, "capacity_factor": 1.0}, {"ep_size": 4, "exchange": "token"}, accumulation=2)
    (row,) = _rows(config, 4, "tokens")
    tokens = 4 * 2**3  # of a micro-batch; with this capacity there are as many slots
    assert (row.count, row.sent) == (4 * 3 * 2, 4 * 3 * 2 * tokens * 32 * 4)
    again = config.training.model_copy(update={"activation_checkpointing": True})
    (row,) = _rows(config.model_copy(update={"training": again}), 4, "tokens")
    assert row.count == 6 * 3 * 2


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_of_all_parameters_are_reduced(stage):
    config = _config(parallel={"ep_size": 2, "zero_stage": stage}, accumulation=3)
    count, passes = count_parameters(config, 4), 3 if stage == 2 else 1
    sent = {row.group: row.sent for row in _rows(config, 4, "gradients")}
    assert sent == {"world": passes * 4 * count.shared, "expert data parallel": passes * 4 * count.rank_expert}


def test_buckets_of_zero_hold_at_most_their_size():
    config = _config(parallel={"ep_size": 2, "zero_stage": 1})
    one = {row.group: row.count for row in _rows(config, 4, "gradients")}
    assert one == {"world": 1, "expert data parallel": 1}
    small = {"zero_optimization": {"reduce_bucket_size": 2000}}
    many = {row.group: row.count for row in _rows(config.model_copy(update={"deepspeed": small}), 4, "gradients")}
    assert all(count > 3 for count in many.values())


def test_without_zero_no_weights_are_gathered():
    assert not _rows(_config(), 4, "updated weights")
    assert _rows(_config(parallel={"zero_stage": 1}), 4, "updated weights")


@pytest.mark.parametrize(("balance", "count"), [("loss", 0), ("global", 2), ("bias", 3)])
def test_balance_over_ranks_needs_sums(balance, count):
    config = _config({"router": {"balance": balance}}, accumulation=2)
    assert sum(row.count for row in _rows(config, 2, "loads of the experts")) == count


def test_ranks_with_slabs_gather_keys_values_and_a_few_numbers():
    config = _config(parallel={"context_size": 2, "ep_size": 1})
    keys_and_values = 2 * 4 * 2**3 * 32 * 4  # of whole samples, in float32
    features, errors = 2 * 2 * 4 * 3 * 8 * 4, 2 * 4 * 4  # mean and standard deviation of 3 x 8 inputs; errors
    expected = {
        "keys and values": ("all_gather", 3, 3 * keys_and_values),
        "gradients of keys and values": ("reduce_scatter", 3, 3 * keys_and_values),
        "means over slabs": ("all_gather", 2, features + errors),
        "gradients of means over slabs": ("reduce_scatter", 1, errors),
        "loads of the experts": ("all_reduce", 1, 8 * (3 * 4 + 2)),
    }
    rows = [row for row in step_traffic(config, 4) if row.group == "context parallel"]
    assert {row.why: (row.kind, row.count, row.sent) for row in rows} == expected
    assert {row.ranks for row in rows} == {2}
    assert not any(row.group == "context parallel" for row in step_traffic(_config(), 4))


def test_the_table_leaves_out_groups_of_one_rank():
    assert "expert data parallel" not in traffic_table(load_config(CONFIGS / "node_8gpu.yaml"), 8)
    assert "among 8 ranks (expert parallel), 67.1 MB: samples" in traffic_table(
        load_config(CONFIGS / "node_8gpu.yaml"), 8
    )
    assert traffic_table(_config(), 1).startswith("collectives       0 per rank and step, 0.0 MB")
