"""The soak test of benchmarks/, with a tiny model and for a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.hosts import missing
from tests.tiny import write_config

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
@pytest.mark.timeout(500)
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(f"NO SOAK TEST: {reason}")
    config = write_config(tmp_path)
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--config", config, "--json", tmp_path / "soak.json"]
    command += ["--minutes", "1", "--every", "25", "--seed", "3", "--compare-at", "100", "--without", "clock jumps"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert len(result["faults"]) >= 2
    assert all(fault["outcome"] in ("untouched", "by itself", "new start") for fault in result["faults"])
    assert result["steps"] > result["equal_to_a_run_without_faults_at_step"]
    assert "steps repeated" in done.stdout
