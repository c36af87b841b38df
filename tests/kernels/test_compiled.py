"""numba's parallel loops run serially with one thread, and give the same bits with more."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import hashlib, sys, numba, torch
torch.set_num_threads(int(sys.argv[1]))
from shodh_moe.kernels import combine, curl, dispatch, topk_gating
torch.manual_seed(0)
x, logits, a = torch.randn(100, 8), torch.randn(100, 4), torch.randn(1, 3, 64, 64, 64)
g = topk_gating(logits, 30)
for _ in range(2):
    rows = dispatch(x, g.expert_N, g.slot_N, g.kept_E, 30)
    y = combine(rows, g.expert_N, g.slot_N, g.gate_N, g.kept_E)
    u = curl(a)
try:
    layer = numba.threading_layer()
except ValueError:  # not started
    layer = "none"
print(layer, hashlib.sha256(y.numpy().tobytes() + u.numpy().tobytes()).hexdigest())
"""


def _run(threads: int) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, str(threads)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_one_thread_starts_no_others_and_several_give_the_same_bits():
    """A rank with one thread must not start numba's threads: their spinning halves the speed of other ranks."""
    several, bits = _run(2)  # first, so that a cache of compiled parallel loops exists and could be confused
    none, same_bits = _run(1)
    assert several != "none"
    assert none == "none"
    assert same_bits == bits
