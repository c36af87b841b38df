"""What counts as wrong in the records of a rehearsal."""

from __future__ import annotations

import pytest

from shodh_moe.config import Config
from shodh_moe.rehearsal.findings import Findings, planned_memory, problems
from shodh_moe.rehearsal.rehearse import table
from shodh_moe.runs.traffic import step_traffic

CONFIG = Config.model_validate(
    {
        "data": {"grid": [16, 16, 16]},
        "model": {"dim": 32, "depth": 2, "heads": 2, "moe": {"num_experts": 2, "expert_hidden": 32}},
        "training": {"batch_size": 2, "precision": "bfloat16"},
    }
)
WORLD = 2


def good() -> Findings:
    """A rehearsal of `CONFIG` on two ranks without a fault."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row in step_traffic(CONFIG, WORLD):
        both = sums.setdefault((row.group, row.kind), [0, 0])
        both[0], both[1] = both[0] + row.count, both[1] + row.sent
    return Findings(
        rank=0,
        world=WORLD,
        peak={"step": planned_memory(CONFIG, WORLD)},
        waits=[
            ("step", "training/engine.py _clipped", "copy to the CPU", 1),
            ("build", "anywhere f", "synchronize", 3),
        ],
        collectives=[("step", *key, *both) for key, both in sums.items()],
        products=[
            ("step", "model/attention.py forward", "mm", "bfloat16 bfloat16", 4),
            ("step", "model/routers/cosine.py logits", "mm", "float32 float32", 1),
            ("step", "deepspeed/runtime/engine.py backward", "mm", "float32 float32", 2),
        ],
    )


def test_a_rehearsal_like_the_plan_has_no_problem():
    assert problems(good(), CONFIG) == []
    assert "nothing is wrong" in table(good(), CONFIG)


FAULTS = {
    "a wait": ("waits", ("step", "model/moe.py forward", "_local_scalar_dense", 2), "model/moe.py forward waits"),
    "a wait of records in a step": (
        "waits",
        ("step", "training/telemetry.py summary", "copy to the CPU", 1),
        "telemetry.py summary waits",
    ),
    "a wide product": (
        "products",
        ("step", "model/attention.py forward", "mm", "float32 float32", 1),
        "model/attention.py forward multiplies in float32 float32 and not in bfloat16",
    ),
    "a wide product of the backward pass": (
        "products",
        ("step", "deepspeed/runtime/engine.py backward", "bmm", "float32 float32", 1),
        "1 products that are not in the training's precision",
    ),
    "a collective": (
        "collectives",
        ("step", "world", "broadcast", 1, 8),
        "broadcast in the group world: 1 with 8 bytes",
    ),
}


@pytest.mark.parametrize(("records", "row", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(records, row, says):
    found = good()
    getattr(found, records).append(row)
    (line,) = problems(found, CONFIG)
    assert says in line
    assert line in table(found, CONFIG)


def test_a_missing_collective_and_other_bytes_are_named():
    found = good()
    phase, group, kind, count, sent = found.collectives[0]
    found.collectives[0] = (phase, group, kind, count, sent + 4)
    (line,) = problems(found, CONFIG)
    assert f"{count} with {sent + 4:,} bytes, but the plan has {count} with {sent:,} bytes" in line
    del found.collectives[0]
    (line,) = problems(found, CONFIG)
    assert "none, but the plan has" in line


@pytest.mark.parametrize("factor", [0.94, 1.06])
def test_memory_more_than_five_percent_from_the_plan_is_named(factor):
    found = good()
    found.peak["step"] = int(factor * found.peak["step"])
    (line,) = problems(found, CONFIG)
    assert "GiB on the device, but the plan has" in line


def test_an_error_is_the_only_problem():
    found = good()
    found.error = "step: model/moe.py forward: FakeTensorDeviceMismatchError: two devices"
    assert problems(found, CONFIG) == [found.error]
