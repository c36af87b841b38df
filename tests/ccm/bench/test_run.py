"""The benchmark from data to tables, at a size that shows nothing about CCM, and resuming it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.bench.aims import ROWS
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.bench.run import run
from shodh_moe.ccm.family import FAMILIES, SPLITS
from shodh_moe.cli import main as shodh
from shodh_moe.launching import jobs
from shodh_moe.launching.jobs import ProcessJob, run_jobs


def _config(folder: Path) -> BenchConfig:
    training = {"steps": 2, "batch_size": 5, "warmup_steps": 1}
    family = {
        "name": "reaction_diffusion",
        "root": str(folder / "data"),
        "grid": 26,
        "snapshots": 6,
        "trajectories": dict.fromkeys(SPLITS, 1),
    }
    phase = {"rollout": [1], "training": training}
    one = {"family": family, "anchor": phase, "endpoint": phase, "fine_tuning": {"steps": 1, "learning_rates": [1e-3]}}
    one["variants"] = {"short": {"steps": 1}}
    tree = {"name": "bench", "runs": str(folder), "seeds": [3], "families": {"reaction_diffusion": one}}
    return BenchConfig.model_validate(tree)


@pytest.mark.distributed
def test_the_benchmark_runs_to_its_tables_and_keeps_existing_files(tmp_path, monkeypatch, capfd):
    config = _config(tmp_path)
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    assert shodh(["bench", "ccm", "--config", str(path), "--output", str(tmp_path / "docs")]) == 0
    assert "## Aims" in capfd.readouterr().out
    result = json.loads((config.folder / "results" / "reaction_diffusion-3.json").read_text())
    assert len(result["regimes"]) == 8
    assert all(set(regime["rows"]) == set(ROWS) for regime in result["regimes"])
    with np.load(config.folder / "results" / "reaction_diffusion-3.npz") as example:
        assert example["truth"].shape == (26, 26)
    summary = json.loads((tmp_path / "docs" / "summary.json").read_text())
    assert summary["config"]["seeds"] == [3]
    assert list(summary["variants"]["reaction_diffusion"]) == ["unchanged", "short"]
    assert "\n## Variants\n" in (tmp_path / "docs" / "summary.md").read_text()
    assert summary["families"]["reaction_diffusion"]["cpu_seconds"]["variants"] > 0
    assert {"summary.md", "ood.png", "alpha_curves.png", "regimes.png", "straightness.png"} <= {
        one.name for one in (tmp_path / "docs").iterdir()
    }

    monkeypatch.setattr(jobs, "_run", lambda *arguments: pytest.fail("a process was started"))
    run(config)

    wider = replace(FAMILIES["reaction_diffusion"], high=7e-3)
    monkeypatch.setitem(FAMILIES, "reaction_diffusion", wider)
    with pytest.raises(UserError, match=r"was trained on ccm-.*choose another name"):
        run(config)


def test_a_failure_stops_the_benchmark_and_its_last_output_is_shown(tmp_path):
    def job(name: str, code: str) -> ProcessJob:
        return ProcessJob(name, ["-c", code], tmp_path / f"{name}.log", tmp_path / f"{name}.json")

    bad = job("bad", "import sys; print('error: no such thing', file=sys.stderr); print('more'); sys.exit(2)")
    late = job("late", "open(r'%s', 'w')" % (tmp_path / "made"))
    with pytest.raises(UserError, match="bad ended with code 2: error: no such thing"):
        run_jobs([bad, late], 1)
    assert not (tmp_path / "made").exists()


def test_the_time_of_a_process_is_summed_over_its_starts(tmp_path):
    work = "import time; began = time.process_time()\nwhile time.process_time() < began + 0.2: pass"
    job = ProcessJob("busy", ["-c", work], tmp_path / "log", tmp_path / "cost.json")
    run_jobs([job], 2)
    first = jobs.read_cost(job.cost)["cpu_seconds"]
    run_jobs([job], 2)
    assert first > 0.19
    assert jobs.read_cost(job.cost)["cpu_seconds"] > first + 0.19


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": []}, "one or more different seeds"),
        ({"families": {}}, "one or more families"),
        ({"families": {"x": {"family": {"nam": "y"}}}}, "unknown key 'families.x.family.nam'"),
    ],
)
def test_invalid_settings_are_named(tmp_path, capfd, change, words):
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump({**_config(tmp_path).model_dump(), **change}))
    assert shodh(["bench", "ccm", "--config", str(path)]) == 2
    assert words in capfd.readouterr().err
