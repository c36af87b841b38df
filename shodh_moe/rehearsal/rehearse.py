"""Rehearse a config in a process of its own, and print what it shows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.rehearsal.findings import STEP, Findings, planned_memory, problems


def rehearse(config: Config, world: int, rank: int = 0) -> Findings:
    """Run one rank of a training on fake CUDA tensors: steps, a record, a validation.

    The process needs about 1 GB of memory and, once the stub is compiled, some seconds for each GB of activations.

    Args:
        rank: which of the ``world`` ranks.

    Raises:
        UserError: the process failed before it could begin.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "config.yaml", Path(folder) / "findings.json"
        settings.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "shodh_moe.rehearsal", str(settings), str(world), str(rank), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f"the rehearsal could not begin: {lines[-1] if lines else f'code {done.returncode}'}")
        found = Findings(**json.loads(result.read_text(encoding="utf-8")))
    found.waits = [tuple(row) for row in found.waits]  # type: ignore[misc]
    found.collectives = [tuple(row) for row in found.collectives]  # type: ignore[misc]
    found.products = [tuple(row) for row in found.products]  # type: ignore[misc]
    return found


def table(found: Findings, config: Config) -> str:
    """Return what ``shodh plan --rehearse`` prints."""
    wrong = problems(found, config)
    lines = [f"rehearsal of rank {found.rank} of {found.world}"]
    if not found.error:
        peak, planned = found.peak[STEP] / 2**30, planned_memory(config, found.world) / 2**30
        lines.append(f"  memory      {peak:.2f} GiB at most in a step; planned for an even load {planned:.2f} GiB")
        others = {
            phase: size for phase, size in found.peak.items() if phase in ("validation", "tokenizer step", "predict")
        }
        lines += [f"  memory      {size / 2**30:.2f} GiB at most in {phase}" for phase, size in others.items()]
        lines += [
            f"  waits       {what} in {place}, {count} times in a step"
            for phase, place, what, count in found.waits
            if phase == STEP
        ]
        lines += [
            f"  {kind + ' ':<12}{count} in a step in the group {group}, {sent / 1e6:,.1f} MB"
            for phase, group, kind, count, sent in found.collectives
            if phase == STEP
        ]
    lines += [f"  wrong       {line}" for line in wrong] or ["  nothing is wrong"]
    return "\n".join(lines)
