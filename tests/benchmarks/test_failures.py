"""The study that counts failed runs, on made-up records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml


@pytest.fixture
def script(importable: None) -> ModuleType:
    return importlib.import_module("studies.failures")


def write_run(
    folder: Path,
    seed: int,
    error: float,
    steps: int = 600,
    last: int = 600,
    start: str | None = None,
    batch_size: int = 12,
) -> None:
    run = folder / f"moe-channel-{seed}-{steps}{bool(start)}"
    run.mkdir(parents=True)
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": 5e-3, "keep_every": seed}
    config = {"name": run.name, "seed": seed, "start": start, "training": training}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    record = {
        "kind": "valid",
        "step": last,
        "latent_mse": {"channel": error},
        "latent_mse_persistence": {"channel": 2.0},
    }
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_runs_are_compared_with_those_of_other_seeds(script: ModuleType, tmp_path: Path) -> None:
    for seed, error in enumerate((0.2, 0.22, 0.19, 0.28)):
        write_run(tmp_path, seed, error)
        write_run(tmp_path, seed, 0.1, steps=1500, last=1500)
    write_run(tmp_path, 9, 1.0, last=300)  # unfinished
    write_run(tmp_path, 8, 1.0, start="elsewhere")
    short, long = script.groups_in(tmp_path)
    assert (short.steps, short.errors) == (600, {0: 0.1, 1: 0.11, 2: 0.095, 3: 0.14})
    assert short.failed == [3]
    assert short.worst == pytest.approx(0.14 / 0.105)
    assert long.failed == []
    assert "1 of 8 runs failed." in script.table([short, long])
    assert "| moe-channel | 600 | 12 | 0.005 | channel | 4 | 0.105 | 1.33 | seed 3 |" in script.table([short, long])


def test_runs_that_all_end_at_persistence_have_failed(script: ModuleType) -> None:
    assert script.failed({0: 0.95, 1: 0.94, 2: 0.96}) == [0, 1, 2]
    assert script.failed({0: 0.2, 1: 0.2, 2: float("nan")}) == [2]


def test_runs_of_another_batch_size_are_counted_too(script: ModuleType, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / "a", seed, 0.2)
        write_run(tmp_path / "b", seed, 0.2, batch_size=3)
    runs = [run for folder in ("a", "b") for run in (tmp_path / folder).iterdir()]
    for number, run in enumerate(runs):
        run.rename(tmp_path / f"{number}")
    assert "0 of 6 runs failed." in script.table(script.groups_in(tmp_path))


def test_a_run_that_diverged_has_failed(script: ModuleType, tmp_path: Path) -> None:
    for seed in range(4):
        write_run(tmp_path, seed, 0.2, last=600 if seed else 300)
    (tmp_path / "moe-channel-0-600False" / "nonfinite").mkdir()
    (tmp_path / "moe-channel-0-600False" / "nonfinite" / "301.json").write_text("{}")
    assert [group.failed for group in script.groups_in(tmp_path)] == [[0]]


def test_too_few_seeds_are_left_out(script: ModuleType, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, seed, 0.2)
    assert script.groups_in(tmp_path) == []


def test_a_folder_without_runs_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "has no finished training run" in capsys.readouterr().err
