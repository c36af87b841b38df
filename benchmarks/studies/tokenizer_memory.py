"""Compare the memory of the tokenizer's training step on a CPU with the prediction of `shodh tokenizer plan`.

Each case is a separate process that makes training steps (forward, loss, backward, clipping, AdamW) with the default
sizes on random fields with a solid sphere, and reports its peak resident memory. ``before`` is its memory with all
libraries loaded, after a step on a 32^3 grid. A real run keeps freed memory, which is faster (`keep_freed_memory`), so
unused memory between tensors of different sizes grows over the first steps. The cases with one step return freed memory
to the system and thus show the memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.config import Config
from support.common import describe, machine

LIMIT = 24 * 2**30  # memory of a 24 GiB GPU, for comparison
DECODERS = ({"operator": "spectral", "walls": "none"}, {"operator": "staggered", "walls": "exact"})


def config_of(case: dict[str, Any], side: int) -> Config:
    tokenizer = {key: case[key] for key in ("operator", "walls", "activation_checkpointing")} | {"batch_size": 1}
    return Config.model_validate({"data": {"grid": [side] * 3}, "tokenizer": tokenizer})


def random_fields(side: int) -> Tensor:
    """Velocity, pressure and a solid sphere with a radius of a quarter of the side, [1, 5, X, Y, Z]."""
    fields = torch.randn(1, 5, side, side, side)
    square = ((torch.arange(side) + 0.5) / side - 0.5) ** 2
    fields[:, 4] = (square[:, None, None] + square[None, :, None] + square < 0.25**2).float()
    return fields


def steps(config: Config, count: int) -> list[float]:
    """Make training steps. Returns the seconds of each."""
    from shodh_moe.tokenizer.reconstruction import Reconstruction
    from shodh_moe.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer(config.tokenizer, config.data.grid)
    tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = config.tokenizer.activation_checkpointing
    errors = Reconstruction(tokenizer)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    fields = random_fields(config.data.grid[0])
    for parameter in tokenizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the moments
    optimizer.zero_grad(set_to_none=True)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        velocity_B, pressure_B = errors(fields)[:2]
        loss = (3 * velocity_B.mean() + pressure_B.mean()) / 4
        del velocity_B, pressure_B
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def resident() -> int:
    """Current resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def work(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process."""
    from shodh_moe.runs.tokenizer_plan import memory

    if case["keeps_freed_memory"]:
        keep_freed_memory()
    config = config_of(case, case["grid"])
    plan = memory(config, 1, config.tokenizer.activation_checkpointing)
    steps(config_of(case, 32), 1)
    before = resident()
    seconds = steps(config, case["steps"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # One process with fields in memory reduces no gradients and keeps no batch that was read from disk.
    planned = plan["sum"] - plan["reduction"] - plan["batch"]
    return {
        "case": case,
        "before_bytes": before,
        "peak_bytes": peak,
        "step_bytes": peak - before,
        "planned_step_bytes": planned,
        "planned_peak_over_peak": (before + planned) / peak,
        "planned_parts": plan,
        "within_24_gib": peak <= LIMIT,
        "seconds": seconds,
    }


def run(options: argparse.Namespace) -> None:
    if options.json:
        require_writable(options.json.absolute().parent)
    cases = [
        {**decoder, "grid": grid, "activation_checkpointing": on, "keeps_freed_memory": keeps, "steps": count}
        for grid in options.grids
        for keeps, count in ((False, 1), (True, 4))
        for decoder in DECODERS
        for on in (False, True)
    ]
    content: dict[str, Any] = {"benchmark": "tokenizer_memory", "machine": machine(torch.device("cpu")), "results": []}
    for case in cases:
        child = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
        if child.returncode:
            raise UserError(f"{describe(case)} ended with code {child.returncode}: {child.stderr.strip()[-300:]}")
        found = json.loads(child.stdout.splitlines()[-1])
        content["results"].append(found)
        peak, before, planned = (found[key] / 2**30 for key in ("peak_bytes", "before_bytes", "planned_step_bytes"))
        print(
            f"{describe(case)}: peak {peak:.2f} GiB, {before:.2f} before; the step {peak - before:.2f}, planned "
            f"{planned:.2f}; planned peak / peak {found['planned_peak_over_peak']:.2f}; {min(found['seconds']):.1f} s",
            flush=True,
        )
        if options.json:
            write_text(options.json, json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, date and results here")
    parser.add_argument("--grids", type=int, nargs="+", default=[64, 128], help="sides of the cubic grids")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        return exit_code(lambda: print(json.dumps(work(options.case))))
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
