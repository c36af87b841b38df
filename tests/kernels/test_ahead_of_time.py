"""Compilation for GPUs that are not present reports resources and detects kernels that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys, torch
from shodh_moe.kernels import backend, gating_triton
from shodh_moe.kernels.ahead_of_time import compile_variant, variant

def resources(target, **blocks):
    gating_triton.settings = lambda kernel, size_class, default, device: default | blocks
    with backend.record() as launches:
        gating_triton.forward(torch.empty(5000, 100, device="meta"), 60, "position", None)
    first = variant(launches[0])
    assert first == variant(launches[0]) and first.name == "gating.route"
    return vars(compile_variant(first, target))

found = {target: resources(target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")}
found["crowded"] = resources("sm_90", BLOCK_N=128, num_warps=1)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resources_are_reported_and_spills_are_detected():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert 16 <= found[target]["registers"] <= 512
        assert 0 < found[target]["shared_bytes"] < 64 * 1024
        assert found[target]["spill_bytes"] == 0
    assert found["crowded"]["spill_bytes"] > 0
